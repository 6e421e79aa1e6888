// SPDX-License-Identifier: Apache-2.0

// Package apiserver is the Kubernetes API server as a source of pod facts.
package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"

	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/redirect"
)

// A Source is the Kubernetes API server as a podfacts.Source.
type Source struct {
	client *kubeapi.Client
}

// New returns the API server that kubeconfig names. The file is read
// at each question, and so need not be there yet.
func New(kubeconfig, userAgent string) *Source {
	return &Source{client: kubeapi.NewClient(kubeconfig, userAgent)}
}

func (a *Source) String() string {
	return "the API server by " + a.client.Kubeconfig()
}

// Pod gets the pod once. A kubeconfig that can't be used, and an answer that
// means "not you" or "not so", is permanent.
func (a *Source) Pod(ctx context.Context, namespace, name, _ string) (*redirect.Pod, error) {
	body, err := a.client.Pod(ctx, namespace, name)
	if err != nil {
		return nil, classify(err)
	}
	pod, err := redirect.ParsePod(body)
	if err != nil {
		return nil, fmt.Errorf("read what the API server answered: %w", err)
	}
	return pod, nil
}

// classify says which errors of the client are worth another try, and adds the
// remedy to those that are not.
func classify(err error) error {
	var config *kubeapi.ConfigError
	if errors.As(err, &config) {
		remedy := "mend the file"
		switch {
		case errors.Is(err, fs.ErrNotExist):
			remedy = "the node agent writes it: see that it runs, or let the network configuration's kubeconfig name another"
		case errors.Is(err, fs.ErrPermission):
			remedy = "let root read it"
		}
		return podfacts.Permanent(fmt.Errorf("%w (%s)", err, remedy))
	}
	var status *kubeapi.StatusError
	if !errors.As(err, &status) {
		return err // the network's
	}
	switch code := status.Code; {
	case code == http.StatusUnauthorized:
		return podfacts.Permanent(fmt.Errorf("%w (the kubeconfig's credentials are not valid: the node agent renews them, see that it runs)", err))
	case code == http.StatusForbidden:
		return podfacts.Permanent(fmt.Errorf("%w (allow the kubeconfig's user to get pods in every namespace)", err))
	case code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable:
		return podfacts.RetryAfter(err, status.RetryAfter)
	case code == http.StatusNotFound || code == http.StatusRequestTimeout || code >= 500:
		return err
	}
	return podfacts.Permanent(err)
}
