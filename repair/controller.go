// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/client-go/util/workqueue"

	"shunt.dev/shunt/internal/podcache"
	"shunt.dev/shunt/redirect"
)

// Options say what a controller does with pods that it finds.
type Options struct {
	Filter
	// RepairPods has a pod be mended in place; DeletePods, where that is off or
	// can't be, deleted; LabelPods, where both are, labelled.
	RepairPods, DeletePods, LabelPods bool
	LabelKey, LabelValue              string
	// RespectDisruptionBudgets has pods be evicted rather than deleted.
	RespectDisruptionBudgets bool

	Client kubernetes.Interface
	Log    *slog.Logger

	// list, if there is one, gets the pods that a sweep has found lost.
	list func([]redirect.PodRef) error
	pace
}

// pace is how fast a controller goes. Tests have another.
type pace struct {
	workers    int
	qps        float32 // of calls that change something
	burst      int
	callTime   time.Duration // of one call
	retryFirst time.Duration
	retryMost  time.Duration
	sweepEvery time.Duration
	grace      time.Duration // how long a container must have been running for its pod to be looked at
	settle     time.Duration // between two looks, which both must find the same
	reread     time.Duration // between two looks at the netconf, of which the kubelet takes a minute to bring a change
}

var usualPace = pace{
	workers: 4, qps: 10, burst: 20, callTime: 10 * time.Second,
	retryFirst: 500 * time.Millisecond, retryMost: 5 * time.Minute,
	sweepEvery: time.Minute, grace: 30 * time.Second, settle: 5 * time.Second, reread: 5 * time.Second,
}

// A key names one pod: another of that name is another.
type key struct {
	namespace, name string
	uid             types.UID
}

func keyOf(pod *corev1.Pod) key { return key{pod.Namespace, pod.Name, pod.UID} }

// healer is what a mender is.
type healer interface {
	decide(pod *corev1.Pod) (*redirect.Pod, *redirect.Policy, error)
	look(ctx context.Context, pod *corev1.Pod) (*patient, state, error)
	mend(ctx context.Context, pod *corev1.Pod, others bool) (by redirect.Choice, already bool, err error)
	tidy(ctx context.Context) error
}

// A controller looks after the pods of one node.
type controller struct {
	Options
	pods    *podcache.Cache
	heal    healer
	api     *apiWriter
	events  *eventWriter
	metrics *metrics
	queue   workqueue.TypedDelayingInterface[key]
	backOff workqueue.TypedRateLimiter[key]

	mu sync.Mutex
	// done are the pods that nothing more is to be done for, and failed what was
	// said last of those that it was tried in vain for. Both forget a pod that
	// is gone.
	done   map[types.UID]time.Time
	failed map[types.UID]string
	found  map[types.UID]state // what sweeps have told of
}

func newController(opts Options, heal healer, m *metrics) *controller {
	c := &controller{
		Options: opts, heal: heal, metrics: m,
		pods:    podcache.New(podcache.Options{Client: opts.Client, Node: opts.Node, Log: opts.Log}),
		api:     &apiWriter{client: opts.Client, limit: flowcontrol.NewTokenBucketRateLimiter(opts.qps, opts.burst), timeout: opts.callTime},
		queue:   workqueue.NewTypedDelayingQueue[key](),
		backOff: workqueue.NewTypedItemExponentialFailureRateLimiter[key](opts.retryFirst, opts.retryMost),
		done:    map[types.UID]time.Time{}, failed: map[types.UID]string{}, found: map[types.UID]state{},
	}
	// What is done to pods does not wait for what is said of it.
	say := *c.api
	say.limit = flowcontrol.NewTokenBucketRateLimiter(opts.qps, opts.burst)
	c.events = newEventWriter(&say, opts.Node, func(e *corev1.Event, err error) {
		c.Log.Warn("an event was not written", "pod", e.Namespace+"/"+e.InvolvedObject.Name, "reason", e.Reason, "message", e.Message, "error", err)
	})
	return c
}

// run looks after the node's pods until ctx ends.
func (c *controller) run(ctx context.Context) {
	c.pods.AddEventHandler(handler(c.notice))
	var wg, saying sync.WaitGroup
	// What was said before the end is still written, if that takes not long.
	said, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	saying.Go(func() { c.events.run(said) })
	wg.Go(func() { c.pods.Inform(ctx) })
	for range c.workers {
		wg.Go(func() {
			for c.next(ctx) {
			}
		})
	}
	wg.Go(func() { c.sweeps(ctx) })
	<-ctx.Done()
	c.queue.ShutDown()
	wg.Wait()
	c.events.close()
	timer := time.AfterFunc(2*time.Second, stop)
	defer timer.Stop()
	saying.Wait()
}

// handler has f be told of each pod that there is, of what changes, and of each
// that is gone.
func handler(f func(pod *corev1.Pod)) cache.ResourceEventHandler {
	tell := func(obj any) {
		if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = last.Obj
		}
		if pod, ok := obj.(*corev1.Pod); ok {
			f(pod)
		}
	}
	return cache.ResourceEventHandlerFuncs{AddFunc: tell, UpdateFunc: func(_, now any) { tell(now) }, DeleteFunc: tell}
}

// notice is told of each pod, also of one that is gone.
func (c *controller) notice(pod *corev1.Pod) {
	if now := c.pods.Get(pod.Namespace, pod.Name); now == nil || now.UID != pod.UID {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.done, pod.UID)
		delete(c.failed, pod.UID)
		delete(c.found, pod.UID)
		return
	}
	if broken, _ := c.Broken(pod); broken {
		c.queue.Add(keyOf(pod))
	}
}

func (c *controller) next(ctx context.Context) bool {
	k, quit := c.queue.Get()
	if quit {
		return false
	}
	defer c.queue.Done(k)
	err := c.treat(ctx, k)
	switch {
	case err == nil:
		c.backOff.Forget(k)
	case ctx.Err() != nil:
	default:
		c.queue.AddAfter(k, max(c.backOff.When(k), retryAfter(err)))
	}
	return true
}

// treat does for a broken pod what is to be done. An error is tried again.
func (c *controller) treat(ctx context.Context, k key) error {
	pod := c.pods.Get(k.namespace, k.name)
	if pod == nil || pod.UID != k.uid {
		return nil
	}
	if broken, _ := c.Broken(pod); !broken || c.isDone(pod) {
		return nil
	}
	// A pod that the rules let alone has no redirection to wait for: what it
	// fails by, nothing done here would change.
	_, _, err := c.heal.decide(pod)
	var skip *skipError
	if errors.As(err, &skip) {
		c.Log.Warn("a pod fails its validation, but is to be left alone", "pod", nameOf(pod), "rule", skip.Rule, "reason", skip.Reason)
		c.metrics.count(cmp.Or(c.kindFor(pod), kindRepair), resultSkipped)
		c.events.say(pod, corev1.EventTypeWarning, "RedirectionNotMeant", fmt.Sprintf(
			"init container %s fails because traffic is not redirected, but %v: take the init container, or what keeps the pod from being redirected, away", c.InitContainer, skip))
		c.finish(k.uid)
		return nil
	}
	if err != nil { // nor would another pod of its kind come up
		return c.failure(pod, cmp.Or(c.kindFor(pod), kindRepair), err)
	}
	switch c.kindFor(pod) {
	case kindRepair:
		return c.repair(ctx, pod)
	case kindDelete:
		return c.delete(ctx, pod)
	case kindLabel:
		return c.label(ctx, pod)
	}
	text := "no way to act is switched on"
	if c.RepairPods {
		text = "a pod of restartPolicy Never, or one that has failed, can't be mended, and neither deleting nor labelling is switched on"
	}
	c.Log.Warn("a pod without redirection is left as it is", "pod", nameOf(pod), "why", text)
	c.metrics.count(kindRepair, resultSkipped)
	c.events.say(pod, corev1.EventTypeWarning, "RedirectionMissing", "the pod's traffic is not redirected: "+text)
	c.finish(k.uid)
	return nil
}

// kindFor says what is to be done: to mend goes before to delete, and that
// before to label. Empty: nothing.
func (c *controller) kindFor(pod *corev1.Pod) kind {
	switch {
	case c.RepairPods && canRecover(pod):
		return kindRepair
	case c.DeletePods:
		return kindDelete
	case c.LabelPods:
		return kindLabel
	}
	return ""
}

func (c *controller) repair(ctx context.Context, pod *corev1.Pod) error {
	start := time.Now()
	_, again := c.mended(pod.UID)
	by, already, err := c.heal.mend(ctx, pod, true)
	switch {
	case errors.Is(err, errNoSandbox):
		// The next one is set up by the plugin, if that is there by now.
		c.Log.Info("a pod without redirection has no sandbox to mend", "pod", nameOf(pod))
		return err
	case err != nil:
		return c.failure(pod, kindRepair, err)
	case already && again:
		// As often as the kubelet tries: every five minutes, after a while.
		c.Log.Warn("a pod is redirected, and fails its validation all the same", "pod", nameOf(pod), "uid", pod.UID)
		c.metrics.count(kindRepair, resultAlready)
		c.events.say(pod, corev1.EventTypeWarning, "RedirectionNotSeen", fmt.Sprintf(
			"the pod's traffic is redirected, and init container %s fails all the same: see its log; its ports and ids have to be the proxy's", c.InitContainer))
	case already:
		c.Log.Info("a pod that failed its validation is redirected by now", "pod", nameOf(pod))
		c.metrics.count(kindRepair, resultAlready)
	default:
		c.Log.Info("a pod without redirection was mended in place", "pod", nameOf(pod), "uid", pod.UID,
			"datapath", by.Datapath, "reason", by.Reasons[0].Name, "why", by.Reasons.String(), "took", time.Since(start))
		c.metrics.count(kindRepair, resultOK)
		c.events.say(pod, corev1.EventTypeNormal, "RedirectionRepaired", fmt.Sprintf(
			"the pod had started before Shunt was there; its traffic is redirected now, by %s: init container %s passes when it is started again", by.Datapath, c.InitContainer))
	}
	c.finishAt(pod.UID, time.Now())
	return nil
}

func (c *controller) delete(ctx context.Context, pod *corev1.Pod) error {
	do, how := c.api.remove, "deleted"
	if c.RespectDisruptionBudgets {
		do, how = c.api.evict, "evicted"
	}
	err := do(ctx, pod)
	switch {
	case apierrors.IsNotFound(err):
		c.metrics.count(kindDelete, resultAlready)
		c.finish(pod.UID)
		return nil
	case apierrors.IsConflict(err):
		return c.stale(pod, err)
	case err != nil:
		return c.failure(pod, kindDelete, err)
	}
	c.Log.Info("a pod without redirection was "+how, "pod", nameOf(pod), "uid", pod.UID)
	c.metrics.count(kindDelete, resultOK)
	c.events.say(pod, corev1.EventTypeNormal, "RedirectionMissingPodDeleted",
		"the pod's traffic was not redirected, for it had started before Shunt was there; it was "+how+", so that another comes up right")
	c.finish(pod.UID)
	return nil
}

func (c *controller) label(ctx context.Context, pod *corev1.Pod) error {
	if value, ok := pod.Labels[c.LabelKey]; ok && value == c.LabelValue {
		c.finish(pod.UID) // before this process was there
		return nil
	}
	err := c.api.label(ctx, pod, c.LabelKey, c.LabelValue)
	switch {
	case apierrors.IsNotFound(err):
		c.metrics.count(kindLabel, resultAlready)
		c.finish(pod.UID)
		return nil
	case apierrors.IsConflict(err):
		return c.stale(pod, err)
	case err != nil:
		return c.failure(pod, kindLabel, err)
	}
	c.Log.Info("a pod without redirection was labelled", "pod", nameOf(pod), "uid", pod.UID)
	c.metrics.count(kindLabel, resultOK)
	c.events.say(pod, corev1.EventTypeWarning, "RedirectionMissingPodLabelled", fmt.Sprintf(
		"the pod's traffic is not redirected, for it had started before Shunt was there; it was labelled %s=%s: delete it, so that another comes up right", c.LabelKey, c.LabelValue))
	c.finish(pod.UID)
	return nil
}

// stale is for what another has changed meanwhile: it is looked at anew.
func (c *controller) stale(pod *corev1.Pod, err error) error {
	c.Log.Debug("a pod has changed meanwhile, and is looked at anew", "pod", nameOf(pod), "error", err)
	return err
}

// failure tells of an attempt that has failed: each in the metric, and by event
// and as a warning what was not told last.
func (c *controller) failure(pod *corev1.Pod, k kind, err error) error {
	c.metrics.count(k, resultFailed)
	text := err.Error()
	c.mu.Lock()
	again := c.failed[pod.UID] == text
	c.failed[pod.UID] = text
	c.mu.Unlock()
	if again {
		c.Log.Debug("another attempt has failed", "type", k, "pod", nameOf(pod), "error", err)
		return err
	}
	c.Log.Warn("a pod without redirection could not be dealt with; it is tried again", "type", k, "pod", nameOf(pod), "error", err)
	c.events.say(pod, corev1.EventTypeWarning, "RedirectionRepairFailed", fmt.Sprintf("%s: %s; it is tried again", k, oneLine(text)))
	return err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// isDone reports whether nothing more is to be done for a broken pod. One that
// was mended is looked at again when its init container, which was started after
// that, fails all the same.
func (c *controller) isDone(pod *corev1.Pod) bool {
	at, ok := c.mended(pod.UID)
	return ok && (at.IsZero() || !c.Started(pod).After(at))
}

// mended says when a pod that is done was mended; zero: something else was done.
func (c *controller) mended(uid types.UID) (at time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok = c.done[uid]
	return at, ok
}

func (c *controller) finish(uid types.UID) { c.finishAt(uid, time.Time{}) }

// finishAt is finish for a pod that was mended at a time.
func (c *controller) finishAt(uid types.UID, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done[uid] = at
	delete(c.failed, uid)
}

// sweeps looks at the pods that run, from time to time.
func (c *controller) sweeps(ctx context.Context) {
	tick := time.NewTicker(c.sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if c.pods.Synced() {
			c.sweep(ctx)
		}
	}
}

// sweep looks at each pod that runs and is to be redirected. What it finds wrong
// it looks at again after a while: a sandbox may be just being taken down.
func (c *controller) sweep(ctx context.Context) {
	suspects := map[key]state{}
	for _, pod := range c.pods.Pods() {
		if broken, _ := c.Broken(pod); broken || !c.Running(pod, time.Now(), c.grace) || ctx.Err() != nil {
			continue
		}
		if how := c.inspect(ctx, pod); how > stateGood {
			suspects[keyOf(pod)] = how
		}
	}
	if len(suspects) > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(c.settle):
		}
		for k, before := range suspects {
			pod := c.pods.Get(k.namespace, k.name)
			if pod == nil || pod.UID != k.uid || !c.Running(pod, time.Now(), c.grace) || ctx.Err() != nil {
				continue
			}
			if how := c.inspect(ctx, pod); how == before {
				c.report(ctx, pod, how)
			}
		}
	}
	c.tellStatus()
	if err := c.heal.tidy(ctx); err != nil && ctx.Err() == nil {
		c.Log.Warn("what was programmed for pods that are gone could not be removed; it is tried again", "error", err)
	}
}

// tellStatus lists the pods that nothing is programmed for where `shunt status`
// finds them.
func (c *controller) tellStatus() {
	if c.list == nil {
		return
	}
	lost := []redirect.PodRef{}
	c.mu.Lock()
	for _, pod := range c.pods.Pods() {
		if c.found[pod.UID] == stateLost {
			lost = append(lost, redirect.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)})
		}
	}
	c.mu.Unlock()
	if err := c.list(lost); err != nil {
		c.Log.Warn("shunt status can't be told of pods that are not redirected", "error", err)
	}
}

// inspect says how a running pod is.
func (c *controller) inspect(ctx context.Context, pod *corev1.Pod) state {
	p, how, err := c.heal.look(ctx, pod)
	var skip *skipError
	switch {
	case errors.As(err, &skip), errors.Is(err, errNoSandbox):
		return stateUnknown
	case p != nil && !p.box.Since.IsZero() && time.Since(p.box.Since) < c.grace:
		return stateUnknown // its ADD may not have ended
	case how == stateUnknown:
		c.untold(ctx, pod, err)
	case how == stateGood:
		c.mu.Lock()
		if _, was := c.found[pod.UID]; was {
			delete(c.found, pod.UID)
			c.Log.Info("a pod is redirected as it should be again", "pod", nameOf(pod))
		}
		c.mu.Unlock()
	}
	return how
}

// untold tells of a pod of which nothing can be told, unless that was told.
func (c *controller) untold(ctx context.Context, pod *corev1.Pod, err error) {
	if ctx.Err() != nil {
		return
	}
	text := err.Error()
	c.mu.Lock()
	again := c.failed[pod.UID] == text
	c.failed[pod.UID] = text
	c.mu.Unlock()
	level := slog.LevelWarn
	// Without --repair-pods the container may have no access to pods at all.
	if again || !c.RepairPods {
		level = slog.LevelDebug
	}
	c.Log.Log(ctx, level, "it can't be told whether a pod is redirected as it should be", "pod", nameOf(pod), "error", err)
}

// report tells of a pod that was found lost or wrong, once, and mends it.
func (c *controller) report(ctx context.Context, pod *corev1.Pod, how state) {
	k, text := kindLost, "nothing is programmed, though the pod is to be redirected"
	switch how {
	case stateWrong:
		k, text = kindWrong, "what is programmed is not what it should be"
	case stateForeign:
		text = "nothing of Shunt's is programmed, but others redirect the pod's traffic: it is left to them"
	}
	_, now, err := c.heal.look(ctx, pod)
	if now != how {
		return
	}
	if err != nil {
		text += ": " + oneLine(err.Error())
	}
	c.mu.Lock()
	told := c.found[pod.UID] == how
	c.found[pod.UID] = how
	c.mu.Unlock()
	if !told {
		if how != stateForeign { // which is no loss: it is counted as skipped
			c.metrics.count(k, resultFound)
		}
		c.Log.Warn("a running pod is not redirected as it should be", "pod", nameOf(pod), "uid", pod.UID, "found", text)
		c.events.say(pod, corev1.EventTypeWarning, "RedirectionLost", text)
	}
	switch {
	case how == stateForeign:
		if !told {
			c.metrics.count(k, resultSkipped)
		}
		return
	case !c.RepairPods:
		return
	}
	by, already, err := c.heal.mend(ctx, pod, false)
	switch {
	case errors.Is(err, errNoSandbox):
	case err != nil:
		_ = c.failure(pod, k, err) // the next sweep tries again
	case already:
		c.metrics.count(k, resultAlready)
	default:
		c.Log.Info("a running pod was mended in place", "pod", nameOf(pod), "uid", pod.UID, "datapath", by.Datapath, "why", by.Reasons.String())
		c.metrics.count(k, resultOK)
		c.events.say(pod, corev1.EventTypeNormal, "RedirectionRepaired", fmt.Sprintf("the pod's traffic is redirected again, by %s", by.Datapath))
		c.mu.Lock()
		delete(c.found, pod.UID)
		delete(c.failed, pod.UID)
		c.mu.Unlock()
	}
}

// names lists what is switched on.
func (o *Options) names() []string {
	all := []string{"repair", "delete", "label"}
	on := []bool{o.RepairPods, o.DeletePods, o.LabelPods}
	i := -1
	return slices.DeleteFunc(all, func(string) bool { i++; return !on[i] })
}
