// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"context"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// pods are those of the node, as the API server knows them.
type pods struct {
	informer cache.SharedIndexInformer
}

func newPods(client kubernetes.Interface, node string, log *slog.Logger) *pods {
	lw := cache.NewFilteredListWatchFromClient(client.CoreV1().RESTClient(), "pods", metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	})
	p := &pods{informer: cache.NewSharedIndexInformer(lw, &corev1.Pod{}, 0, cache.Indexers{})}
	// Neither fails before the informer runs.
	_ = p.informer.SetTransform(func(obj any) (any, error) {
		if pod, ok := obj.(*corev1.Pod); ok {
			pod.ManagedFields = nil // the largest part, and nobody reads it
		}
		return obj, nil
	})
	_ = p.informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		log.Warn("the watch of the node's pods has failed, and is tried again", "error", err)
	})
	return p
}

// handle has f be told of each pod that there is, and of what changes.
func (p *pods) handle(f func(pod *corev1.Pod)) {
	tell := func(obj any) {
		if pod, ok := obj.(*corev1.Pod); ok {
			f(pod)
		}
	}
	// It fails only once the informer has ended.
	_, _ = p.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: tell, UpdateFunc: func(_, now any) { tell(now) },
		DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			tell(obj)
		},
	})
}

func (p *pods) run(ctx context.Context) { p.informer.RunWithContext(ctx) }

func (p *pods) synced() bool { return p.informer.HasSynced() }

// get gives a pod, nil where there is none. It must not be changed.
func (p *pods) get(namespace, name string) *corev1.Pod {
	obj, ok, err := p.informer.GetStore().GetByKey(namespace + "/" + name)
	if err != nil || !ok {
		return nil
	}
	pod, _ := obj.(*corev1.Pod)
	return pod
}

func (p *pods) all() (list []*corev1.Pod) {
	for _, obj := range p.informer.GetStore().List() {
		if pod, ok := obj.(*corev1.Pod); ok {
			list = append(list, pod)
		}
	}
	return list
}
