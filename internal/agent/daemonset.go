// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// A verdict says whether the node is still to have the plugin.
type verdict int

const (
	unknown verdict = iota // it could not be told; the plugin stays
	keep                   // the DaemonSet wants the node: another agent will come
	remove                 // it does not, or is gone
)

// How long the agent tries to find out why it was told to end.
const (
	askTimeout = 3 * time.Second // for the API server's answer
	seeTimeout = 3 * time.Second // for the watch to see it, where there is no answer
)

// An owner is the agent's DaemonSet. It is watched all along: when it is
// deleted, the agent's credentials may go with it, and at the moment in which
// it matters the API server may answer no more.
type owner struct {
	client          kubernetes.Interface
	namespace, name string
	node            string
	log             *slog.Logger
	ask, see        time.Duration // askTimeout and seeTimeout

	mu      sync.Mutex
	seen    bool              // it was there at some time
	last    *appsv1.DaemonSet // as the watch has it; nil: it is not there
	changed chan struct{}     // closed when last changes
}

func newOwner(client kubernetes.Interface, namespace, name, node string, log *slog.Logger) *owner {
	return &owner{
		client: client, namespace: namespace, name: name, node: node, log: log,
		ask: askTimeout, see: seeTimeout, changed: make(chan struct{}),
	}
}

// run watches the DaemonSet until ctx ends.
func (o *owner) run(ctx context.Context) error {
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, o.name).String()
	sets := o.client.AppsV1().DaemonSets(o.namespace)
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			opts.FieldSelector = only
			return sets.List(ctx, opts)
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			opts.FieldSelector = only
			return sets.Watch(ctx, opts)
		},
	}, o.client), &appsv1.DaemonSet{}, 0, nil)
	told := ""
	if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		level := slog.LevelDebug
		// It is tried again by itself; but what the API server refuses stays so.
		if text := err.Error(); text != told && (apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err)) {
			level, told = slog.LevelWarn, text
		}
		o.log.Log(ctx, level, "the agent's DaemonSet can't be watched: whether it is deleted may not be noticed", "daemonset", o.String(), "error", err)
	}); err != nil {
		return err
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { o.note(obj.(*appsv1.DaemonSet)) },
		UpdateFunc: func(_, obj any) { o.note(obj.(*appsv1.DaemonSet)) },
		DeleteFunc: func(any) { o.note(nil) },
	})
	if err != nil {
		return err
	}
	informer.RunWithContext(ctx)
	return ctx.Err()
}

// note keeps what the watch has seen; nil: the DaemonSet was deleted.
func (o *owner) note(set *appsv1.DaemonSet) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case set == nil && o.last != nil:
		o.log.Info("the agent's DaemonSet is deleted: the plugin goes when the agent is told to end", "daemonset", o.String())
	case set != nil && set.DeletionTimestamp != nil && (o.last == nil || o.last.DeletionTimestamp == nil):
		o.log.Info("the agent's DaemonSet is being deleted: the plugin goes when the agent is told to end", "daemonset", o.String())
	}
	o.seen = o.seen || set != nil
	o.last = set
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *owner) String() string { return o.namespace + "/" + o.name }

// seenGone says whether the watch has seen that the DaemonSet is deleted, and
// whether it has ever seen it.
func (o *owner) seenGone() (gone, seen bool, changed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.seen && (o.last == nil || o.last.DeletionTimestamp != nil), o.seen, o.changed
}

// verdict says whether the node is still to have the plugin, and why.
func (o *owner) verdict(ctx context.Context) (verdict, string) {
	ask, cancel := context.WithTimeout(ctx, o.ask)
	defer cancel()
	set, err := o.client.AppsV1().DaemonSets(o.namespace).Get(ask, o.name, metav1.GetOptions{})
	if err == nil {
		return o.wanted(ask, set)
	}
	see, cancel := context.WithTimeout(ctx, o.see)
	defer cancel()
	for {
		gone, seen, changed := o.seenGone()
		if gone || seen && apierrors.IsNotFound(err) {
			return remove, fmt.Sprintf("DaemonSet %s is deleted", o)
		}
		if apierrors.IsNotFound(err) {
			// A name that never was is no DaemonSet that was deleted.
			return unknown, fmt.Sprintf("DaemonSet %s is not there, and never was while this agent ran: see --daemonset and --namespace", o)
		}
		select {
		case <-changed:
		case <-see.Done():
			return unknown, fmt.Sprintf("get DaemonSet %s: %v", o, err)
		}
	}
}

// wanted says whether a DaemonSet that is there wants this node, as its
// controller reckons it.
func (o *owner) wanted(ctx context.Context, set *appsv1.DaemonSet) (verdict, string) {
	if set.DeletionTimestamp != nil {
		return remove, fmt.Sprintf("DaemonSet %s is being deleted", o)
	}
	spec := &set.Spec.Template.Spec
	if everywhere(spec) {
		return keep, fmt.Sprintf("DaemonSet %s is for every node", o)
	}
	node, err := o.client.CoreV1().Nodes().Get(ctx, o.node, metav1.GetOptions{})
	if err != nil {
		return unknown, fmt.Sprintf("get node %s, to see whether DaemonSet %s selects it: %v", o.node, o, err)
	}
	fits, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: *spec}).Match(node)
	switch {
	case err != nil:
		return unknown, fmt.Sprintf("see whether DaemonSet %s selects node %s: %v", o, o.node, err)
	case !fits:
		return remove, fmt.Sprintf("DaemonSet %s does not select node %s any more", o, o.node)
	}
	return keep, fmt.Sprintf("DaemonSet %s selects node %s", o, o.node)
}

// everywhere says whether a pod may run on any node that an agent runs on. Not
// to ask for the node spares the right to get nodes.
func everywhere(spec *corev1.PodSpec) bool {
	for label, value := range spec.NodeSelector {
		if label != corev1.LabelOSStable || value != string(corev1.Linux) {
			return false
		}
	}
	return spec.Affinity == nil || spec.Affinity.NodeAffinity == nil ||
		spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil
}
