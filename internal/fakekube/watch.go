// SPDX-License-Identifier: Apache-2.0

package fakekube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sort"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// A frame is one line of a watch's answer.
type frame struct {
	Type   watch.EventType `json:"type"`
	Object json.RawMessage `json:"object"`
}

// bookmarkOf is the object of a bookmark: an empty one with a version.
func bookmarkOf(t *table, rv uint64, endOfInitial bool) frame {
	obj := t.res.fresh()
	obj.SetResourceVersion(strconv.FormatUint(rv, 10))
	obj.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Group: t.res.group, Version: t.res.version, Kind: t.res.kind})
	if endOfInitial {
		obj.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	}
	raw, _ := json.Marshal(obj) // Kubernetes' own types
	return frame{watch.Bookmark, raw}
}

func expired(rv, oldest uint64) frame {
	err := apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", rv, oldest))
	err.ErrStatus.Kind, err.ErrStatus.APIVersion = "Status", "v1"
	raw, _ := json.Marshal(&err.ErrStatus)
	return frame{watch.Error, raw}
}

// beginWatch reads what the watch begins with: the frames to send at once, and
// the version behind which it goes on.
func (s *Server) beginWatch(t *table, q *query) (first []frame, at uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	want := q.params.Get("resourceVersion")
	rv, err := parseRV(want)
	if err != nil {
		return nil, 0, err
	}
	initial := want == "" || want == "0"
	var streaming bool
	if v := q.params.Get("sendInitialEvents"); v != "" {
		on, _ := strconv.ParseBool(v)
		match := q.params.Get("resourceVersionMatch")
		bookmarks, _ := strconv.ParseBool(q.params.Get("allowWatchBookmarks"))
		switch {
		case !s.watchList:
			return nil, 0, invalid("sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
		case match != string(metav1.ResourceVersionMatchNotOlderThan):
			return nil, 0, invalid("resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
		case on && !bookmarks:
			return nil, 0, invalid("allowWatchBookmarks: Forbidden: sendInitialEvents requires allowWatchBookmarks")
		}
		initial, streaming = on, on
		if !on && want == "" {
			rv = s.rv
		}
	}
	if rv > s.rv {
		return nil, 0, tooLarge(rv, s.rv)
	}
	if !initial {
		if rv < t.compacted {
			return []frame{expired(rv, t.compacted)}, 0, nil
		}
		return nil, rv, nil
	}
	for _, o := range t.sorted(q) {
		first = append(first, frame{watch.Added, o.raw})
	}
	if streaming {
		first = append(first, bookmarkOf(t, s.rv, true))
	}
	return first, s.rv, nil
}

func invalid(message string) error {
	err := apierrors.NewInvalid(schema.GroupKind{Group: "meta.k8s.io", Kind: "ListOptions"}, "", nil)
	err.ErrStatus.Message = "ListOptions.meta.k8s.io \"\" is invalid: " + message
	return err
}

// since returns what has happened behind a version, as the watch sees it, and
// the channels that tell when to look again.
func (s *Server) since(t *table, q *query, at uint64) (frames []frame, now uint64, changed, cut, bookmark chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed, cut, bookmark = s.changed, s.cut, s.bookmark
	i := sort.Search(len(t.log), func(i int) bool { return t.log[i].rv > at })
	for ; i < len(t.log); i++ {
		if typ, o := t.log[i].event(q); typ != "" {
			frames = append(frames, frame{typ, o.raw})
		}
	}
	return frames, s.rv, changed, cut, bookmark
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request, t *table, q *query) {
	s.countWatch(1)
	defer s.countWatch(-1)
	frames, at, err := s.beginWatch(t, q)
	if err != nil {
		writeError(w, err)
		return
	}
	bookmarks, _ := strconv.ParseBool(q.params.Get("allowWatchBookmarks"))
	timeout := 30 * time.Minute
	if n, err := strconv.Atoi(q.params.Get("timeoutSeconds")); err == nil && n > 0 {
		timeout = time.Duration(n) * time.Second
	}
	end := time.NewTimer(timeout)
	defer end.Stop()

	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	flusher := w.(http.Flusher)
	enc := json.NewEncoder(w)
	send := func(frames []frame) bool {
		for _, f := range frames {
			if enc.Encode(f) != nil || f.Type == watch.Error {
				return false
			}
		}
		flusher.Flush()
		return true
	}
	if !send(frames) {
		return
	}
	for {
		frames, now, changed, cut, bookmark := s.since(t, q, at)
		at = now
		if !send(frames) {
			return
		}
		select {
		case <-changed:
		case <-bookmark:
			if bookmarks && !send([]frame{bookmarkOf(t, at, false)}) {
				return
			}
		case <-cut:
			panic(http.ErrAbortHandler)
		case <-end.C:
			if bookmarks {
				send([]frame{bookmarkOf(t, at, false)})
			}
			return
		case <-s.stop:
			return
		case <-r.Context().Done():
			return
		}
	}
}

func (s *Server) countWatch(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watches += n
}
