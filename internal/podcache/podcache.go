// SPDX-License-Identifier: Apache-2.0

// Package podcache is the node agent's knowledge of the pods of its node: an
// informer, and the socket by which the plugin asks it. It saves a pod's start
// a round trip to the API server, and the API server a request for each pod.
//
// What it answers is never older than it must be. A pod of which the cache
// does not know, or knows another by that name, is got live from the API
// server; so is every pod while the cache is not filled yet, or its watch has
// been down for StaleAfter, and where the runtime has given no uid by which to
// tell one pod of a name from the next. What the rules read of a pod's spec
// can't change in its life. Its labels and annotations can: from the cache
// they are those of a moment ago. Only where the watch is down and the API
// server can't be asked either are they told as they were before, for a pod of
// the very uid, and the agent's log says so.
package podcache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Options say which pods, and where to serve them.
type Options struct {
	// Client's own limit of requests (QPS) holds for pods that are got live:
	// client-go's default of five a second is too low for a node that boots.
	Client kubernetes.Interface
	Node   string
	RunDir string
	Log    *slog.Logger // nil for none

	// LiveTimeout bounds what getting one pod live may take; 0 for 750 ms. The
	// plugin waits a second for an answer, and asks the API server itself then.
	LiveTimeout time.Duration
	// StaleAfter is how long the watch may be down until its pods are not
	// trusted; 0 for 10 s. A watch that ends is begun anew in far less.
	StaleAfter time.Duration
}

// A Cache knows the pods of one node.
type Cache struct {
	opts     Options
	informer cache.SharedInformer
	live     singleflight.Group

	mu    sync.Mutex
	watch *watched  // the latest
	down  time.Time // since when it is; zero while it is up
}

// New returns a cache that is empty until Run fills it.
func New(opts Options) *Cache {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.LiveTimeout == 0 {
		opts.LiveTimeout = 750 * time.Millisecond
	}
	if opts.StaleAfter == 0 {
		opts.StaleAfter = 10 * time.Second
	}
	c := &Cache{opts: opts, down: time.Now()}
	pods := opts.Client.CoreV1().Pods(metav1.NamespaceAll)
	selector := fields.OneTermEqualSelector("spec.nodeName", opts.Node).String()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return pods.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			w, err := pods.Watch(ctx, o)
			if err != nil {
				return nil, err
			}
			return c.observe(w), nil
		},
	}
	c.informer = cache.NewSharedIndexInformerWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, opts.Client), &corev1.Pod{}, cache.SharedIndexInformerOptions{})
	// Neither fails before the informer runs.
	_ = c.informer.SetTransform(trim)
	_ = c.informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		opts.Log.Warn("the watch of the node's pods has failed, and is tried again", "error", err)
	})
	return c
}

// A watched is a watch that says when it ends.
type watched struct {
	watch.Interface
	events chan watch.Event
	stop   func()
}

func (w *watched) ResultChan() <-chan watch.Event { return w.events }
func (w *watched) Stop()                          { w.stop() }

// observe notes that the watch is up, until it ends.
func (c *Cache) observe(w watch.Interface) watch.Interface {
	done := make(chan struct{})
	o := &watched{Interface: w, events: make(chan watch.Event), stop: sync.OnceFunc(func() { close(done); w.Stop() })}
	c.mu.Lock()
	c.watch, c.down = o, time.Time{}
	c.mu.Unlock()
	go func() {
		defer close(o.events)
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.watch == o { // no other has begun
				c.down = time.Now()
			}
		}()
		for e := range w.ResultChan() {
			select {
			case o.events <- e:
			case <-done:
				return
			}
		}
	}()
	return o
}

// Run fills the cache and serves it, until ctx ends. It fails at once where
// the socket can't be made.
func (c *Cache) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	s, err := c.newServer(ctx)
	if err != nil {
		return fmt.Errorf("serve pods to the plugin: %w", err)
	}
	wg.Go(func() { c.informer.RunWithContext(ctx) })
	return s.run(ctx)
}

// Inform is Run without the socket: it fills the cache, and keeps it filled,
// until ctx ends.
func (c *Cache) Inform(ctx context.Context) { c.informer.RunWithContext(ctx) }

// Get returns the node's pod of that name, trimmed, or nil. It is the cache's
// own, and must not be changed.
func (c *Cache) Get(namespace, name string) *corev1.Pod {
	obj, ok, _ := c.informer.GetStore().GetByKey(namespace + "/" + name) // fails never
	if !ok {
		return nil
	}
	return obj.(*corev1.Pod)
}

// Synced reports whether the cache has been filled.
func (c *Cache) Synced() bool { return c.informer.HasSynced() }

// Pods returns the node's pods, trimmed. They are the cache's own, and must
// not be changed.
func (c *Cache) Pods() []*corev1.Pod {
	list := c.informer.GetStore().List()
	pods := make([]*corev1.Pod, 0, len(list))
	for _, obj := range list {
		pods = append(pods, obj.(*corev1.Pod))
	}
	return pods
}

// AddEventHandler lets h be told of the pods that there are, and of what
// happens to them. They are trimmed, and must not be changed.
func (c *Cache) AddEventHandler(h cache.ResourceEventHandler) {
	if _, err := c.informer.AddEventHandler(h); err != nil {
		c.opts.Log.Error("nobody is told of pods any more", "error", err) // the informer has stopped
	}
}

// staleFor returns for how long the watch has been down, 0 where that is not
// long enough to matter.
func (c *Cache) staleFor() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down.IsZero() {
		return 0
	}
	if d := time.Since(c.down); d >= c.opts.StaleAfter {
		return d
	}
	return 0
}

// cached returns the pod of that name and uid, or nil.
func (c *Cache) cached(namespace, name, uid string) *corev1.Pod {
	if uid == "" || !c.Synced() {
		return nil
	}
	obj, ok, _ := c.informer.GetStore().GetByKey(namespace + "/" + name) // fails never
	if !ok {
		return nil
	}
	pod := obj.(*corev1.Pod)
	facts := redirectMeta(pod)
	if !facts.MatchesUID(uid) {
		return nil
	}
	return pod
}

// pod returns a pod by the rules of the package's comment. Where the API
// server has another pod by that name than uid's, that one is returned: the
// plugin asks again.
func (c *Cache) pod(ctx context.Context, namespace, name, uid string) (*corev1.Pod, error) {
	pod := c.cached(namespace, name, uid)
	stale := c.staleFor()
	if pod != nil && stale == 0 {
		return pod, nil
	}
	live, err := c.fetch(ctx, namespace, name)
	if err == nil || pod == nil || answered(err) {
		return live, err
	}
	c.opts.Log.Warn("the API server can't be asked: the plugin is told of a pod as it was when the watch ended",
		"pod", namespace+"/"+name, "uid", uid, "ago", stale.Round(time.Second), "error", err)
	return pod, nil
}

// answered reports whether the API server has said something of the pod: that
// it is gone, or is not to be told to the agent. Overload is no such thing.
func answered(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	code := status.Status().Code
	return code >= 400 && code < 500 && code != 408 && code != 429
}

// fetch gets a pod from the API server. All who ask for the same one at the
// same time share one request.
func (c *Cache) fetch(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	ch := c.live.DoChan(namespace+"/"+name, func() (any, error) {
		// Not bound to the first who asked, who may go away.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.opts.LiveTimeout)
		defer cancel()
		// client-go's own retries would sleep on what the plugin should hear.
		pod := &corev1.Pod{}
		err := c.opts.Client.CoreV1().RESTClient().Get().Namespace(namespace).Resource("pods").Name(name).MaxRetries(0).Do(ctx).Into(pod)
		if err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("the API server has not answered within %v", c.opts.LiveTimeout)
			}
			return nil, err
		}
		return trimPod(pod), nil
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*corev1.Pod), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
