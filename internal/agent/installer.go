// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"shunt.dev/shunt/install"
)

// firstWait is how long the first install waits for the datapath to be loaded
// and the pods' facts to be served: a pod that starts in between would be set up
// all the same, and wait for both. Pods that start before the install, for whose
// sake it must not wait for long, would not be redirected.
const firstWait = 10 * time.Second

// An installation is an *install.Installer.
type installation interface {
	Run(ctx context.Context) error
	State() install.State
}

// A keeper keeps the plugin on the node, by the netconf that is in force.
type keeper struct {
	config *configFile
	open   func(*config) (installation, error)
	ready  func(ctx context.Context) // waits for what should come before
	fatal  func(error)               // ends the agent
	log    *slog.Logger

	mu  sync.Mutex
	now installation // nil: there is none
	err error        // why
}

// state says how the installation stands.
func (k *keeper) state() install.State {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.now == nil {
		return install.State{Err: k.err}
	}
	return k.now.State()
}

// condition is what /readyz says.
func (k *keeper) condition() (ok bool, text string) {
	st := k.state()
	switch {
	case st.Installed && st.Err == nil:
		return true, fmt.Sprintf("the plugin is in %s since %s", st.File, st.Since.UTC().Format(time.RFC3339))
	case st.Err != nil:
		return false, st.Err.Error()
	}
	return false, "not yet"
}

func (k *keeper) run(ctx context.Context) error {
	first, cancel := context.WithTimeout(ctx, firstWait)
	k.ready(first)
	cancel()
	for ctx.Err() == nil {
		c, changed := k.config.get()
		if c == nil {
			k.set(nil, errors.New("there is no valid netconf"))
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		if err := k.with(ctx, c, changed); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// with keeps the plugin installed by a configuration until there is another.
func (k *keeper) with(ctx context.Context, c *config, changed <-chan struct{}) error {
	now, err := k.open(c)
	if err != nil {
		k.set(nil, err)
		return err
	}
	k.set(now, nil)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-changed:
			k.log.Info("the plugin is installed anew, by the netconf that is in force now")
			cancel()
		case <-stop:
		}
	}()
	err = now.Run(ctx)
	if ctx.Err() != nil {
		return nil //nolint:nilerr // it was told to end
	}
	if err != nil {
		k.fatal(err) // only a container that is started anew can help
	}
	return err
}

func (k *keeper) set(now installation, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now, k.err = now, err
}
