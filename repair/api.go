// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/flowcontrol"
)

// An apiWriter makes the few calls that change something in the cluster. Each is
// bounded, waits for its turn, and is made once: client-go would repeat what was
// answered by 429 on its own, and hold up others meanwhile.
type apiWriter struct {
	client  kubernetes.Interface
	limit   flowcontrol.RateLimiter
	timeout time.Duration
}

func (w *apiWriter) bounded(ctx context.Context, do func(ctx context.Context) error) error {
	if err := w.limit.Wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.timeout, fmt.Errorf("the API server has not answered within %v", w.timeout))
	defer cancel()
	err := do(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

// preconditions keep a call from another pod of that name, and from one that is
// not what it was when it was looked at.
func preconditions(pod *corev1.Pod) *metav1.Preconditions {
	uid, version := pod.UID, pod.ResourceVersion
	return &metav1.Preconditions{UID: &uid, ResourceVersion: &version}
}

// remove deletes the pod.
func (w *apiWriter) remove(ctx context.Context, pod *corev1.Pod) error {
	return w.bounded(ctx, func(ctx context.Context) error {
		return w.client.CoreV1().RESTClient().Delete().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).
			Body(&metav1.DeleteOptions{Preconditions: preconditions(pod)}).MaxRetries(0).Do(ctx).Error()
	})
}

// evict has the API server delete the pod, unless a disruption budget forbids it.
func (w *apiWriter) evict(ctx context.Context, pod *corev1.Pod) error {
	e := &policyv1.Eviction{
		TypeMeta:      metav1.TypeMeta{APIVersion: "policy/v1", Kind: "Eviction"},
		ObjectMeta:    metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name},
		DeleteOptions: &metav1.DeleteOptions{Preconditions: preconditions(pod)},
	}
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return w.bounded(ctx, func(ctx context.Context) error {
		return w.client.CoreV1().RESTClient().Post().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("eviction").
			SetHeader("Content-Type", "application/json").Body(body).MaxRetries(0).Do(ctx).Error()
	})
}

// label labels the pod.
func (w *apiWriter) label(ctx context.Context, pod *corev1.Pod, key, value string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "resourceVersion": pod.ResourceVersion, "labels": map[string]string{key: value},
	}})
	if err != nil {
		return err
	}
	return w.bounded(ctx, func(ctx context.Context) error {
		return w.client.CoreV1().RESTClient().Patch(types.MergePatchType).Namespace(pod.Namespace).Resource("pods").Name(pod.Name).
			Body(patch).MaxRetries(0).Do(ctx).Error()
	})
}

// retryAfter is how long the API server asks to wait; 0 when it does not.
func retryAfter(err error) time.Duration {
	if s, ok := apierrors.SuggestsClientDelay(err); ok {
		return time.Duration(s) * time.Second
	}
	return 0
}

// maxEvents bounds the events that wait for the API server: what is done to pods
// does not wait for them.
const maxEvents = 1024

// An eventWriter writes events in the background.
type eventWriter struct {
	*apiWriter
	node  string
	queue chan *corev1.Event
	lost  func(e *corev1.Event, err error)

	mu     sync.Mutex
	closed bool
}

func newEventWriter(w *apiWriter, node string, lost func(e *corev1.Event, err error)) *eventWriter {
	return &eventWriter{apiWriter: w, node: node, lost: lost, queue: make(chan *corev1.Event, maxEvents)}
}

const component = "shunt-repair"

// say makes an event about a pod. kind is corev1.EventTypeNormal or Warning.
func (w *eventWriter) say(pod *corev1.Pod, kind, reason, message string) {
	now := metav1.Now()
	e := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, GenerateName: pod.Name + ".", Name: fmt.Sprintf("%s.%x", pod.Name, now.UnixNano())},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
		},
		Type: kind, Reason: reason, Message: clip(message, 1024), // the API server's limit
		Source:         corev1.EventSource{Component: component, Host: w.node},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	select {
	case w.queue <- e:
	default:
		w.lost(e, fmt.Errorf("%d wait already", maxEvents))
	}
}

// clip cuts a text that is longer than most bytes.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	const more = "…"
	s = s[:most-len(more)]
	for len(s) > 0 && s[len(s)-1]&0xc0 == 0x80 { // within a character
		s = s[:len(s)-1]
	}
	if len(s) > 0 && s[len(s)-1] >= 0xc0 {
		s = s[:len(s)-1]
	}
	return s + more
}

// run writes what is said until close, each at most a few times.
func (w *eventWriter) run(ctx context.Context) {
	for e := range w.queue {
		var err error
		for range 3 {
			err = w.bounded(ctx, func(ctx context.Context) error {
				return w.client.CoreV1().RESTClient().Post().Namespace(e.Namespace).Resource("events").Body(e).MaxRetries(0).Do(ctx).Error()
			})
			if err == nil || apierrors.IsAlreadyExists(err) || apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || ctx.Err() != nil {
				break
			}
			select {
			case <-ctx.Done():
			case <-time.After(min(max(retryAfter(err), 100*time.Millisecond), w.timeout)):
			}
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			w.lost(e, err)
		}
	}
}

// close lets run end when what was said is written.
func (w *eventWriter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.closed = true
		close(w.queue)
	}
}
