// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"shunt.dev/shunt/install"
)

const (
	// tokenLife is what is asked for: long enough for a node to go without an
	// agent over a night. The API server may give less.
	tokenLife = 24 * time.Hour
	// tokenInterval is between two looks at the pod's token, which the kubelet
	// replaces, and at the file.
	tokenInterval = time.Minute
	// tokenMargin is the life that a token has to have left: until the next look,
	// and the one ADD that has read it before.
	tokenMargin   = 2 * time.Minute
	mintTimeout   = 10 * time.Second
	maxTokenPause = 5 * time.Minute
)

// A tokenKeeper keeps the token of the plugin's kubeconfig, in a file of runDir.
// The pod's own is bound to the pod: the API server refuses it seconds after the
// pod is gone, which is just when the plugin has nobody else to ask. So one is
// asked for that is bound to nothing but the account. Until there is one, and
// where there can be none, the pod's has to do.
type tokenKeeper struct {
	path   string // where it is kept
	source string // the pod's: a file
	mint   func(ctx context.Context, namespace, account string) (token string, expires time.Time, err error)
	log    *slog.Logger

	// Of run alone.
	token  string    // one that was minted,
	renew  time.Time // and from when on it is to be replaced
	jitter float64   // of all nodes, so that they don't come at once: 0 to 1
	next   time.Time // when to try again after a failure
	pause  time.Duration
	told   string // what the last warning was about
}

func newTokenKeeper(client kubernetes.Interface, runDir, source string, log *slog.Logger) *tokenKeeper {
	mint := func(ctx context.Context, namespace, account string) (string, time.Time, error) {
		life := int64(tokenLife / time.Second)
		req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &life}}
		got, err := client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
		if err != nil {
			return "", time.Time{}, err
		}
		return got.Status.Token, got.Status.ExpirationTimestamp.Time, nil
	}
	return &tokenKeeper{path: install.TokenPath(runDir), source: source, mint: mint, log: log, jitter: rand.Float64()} //nolint:gosec // no secret
}

// prepare has the file be there before the plugin is installed, which must not
// wait for the API server.
func (k *tokenKeeper) prepare() error {
	_, _, err := k.look(time.Now())
	return err
}

func (k *tokenKeeper) run(ctx context.Context, beat func()) error {
	for {
		beat()
		pause, err := k.step(ctx)
		if err != nil {
			return err
		}
		if !wait(ctx, pause, nil) {
			return ctx.Err()
		}
	}
}

// step does what is due, and says when to look again.
func (k *tokenKeeper) step(ctx context.Context) (time.Duration, error) {
	held, pods, err := k.look(time.Now())
	if err != nil {
		return 0, err
	}
	now := time.Now()
	due := k.next
	if held != nil && k.renew.After(due) {
		due = k.renew
	}
	if due.After(now) {
		return min(tokenInterval, due.Sub(now)), nil
	}
	asked := time.Now()
	token, expires, err := k.another(ctx, pods)
	if err != nil {
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		k.pause = min(max(firstPause, 2*k.pause), maxTokenPause)
		wait := k.pause + time.Duration(k.jitter*float64(k.pause)/2)
		k.next = time.Now().Add(wait)
		k.complain(err, held)
		return min(tokenInterval, wait), nil
	}
	if err := k.write(token); err != nil {
		return 0, err
	}
	k.log.Info("the plugin's kubeconfig has a token that does not end with this pod", "expires", expires.UTC().Format(time.RFC3339))
	k.took(token, asked, expires)
	k.next, k.pause, k.told = time.Time{}, 0, ""
	return min(tokenInterval, time.Until(k.renew)), nil
}

// look has the file be one that the plugin can use now, and gives its claims if
// it was minted. pods are those of the pod's token, nil where it says nothing.
func (k *tokenKeeper) look(now time.Time) (held, pods *claims, err error) {
	data, err := os.ReadFile(k.source)
	source := string(bytes.TrimSpace(data))
	switch {
	case err != nil:
		err = fmt.Errorf("read the token of the agent's pod: %w", err)
	case source == "":
		err = fmt.Errorf("read the token of the agent's pod: %s is empty", k.source)
	default:
		pods = parseClaims(source)
	}
	if held = k.held(pods, now); held != nil {
		if pods == nil {
			pods = held // whose token it was is all there is to go by
		}
		return held, pods, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return nil, pods, k.write(source)
}

// held gives the claims of a minted token that is still good, of this process or
// of the one before.
func (k *tokenKeeper) held(pods *claims, now time.Time) *claims {
	token := k.is()
	c := parseClaims(token)
	if c == nil || c.Kubernetes.Pod != nil || !c.expires().After(now.Add(tokenMargin)) {
		return nil
	}
	// An account that was made anew, or one of another cluster, by the same name.
	if pods != nil && (c.Issuer != pods.Issuer || c.Subject != pods.Subject || c.Kubernetes.ServiceAccount.UID != pods.Kubernetes.ServiceAccount.UID) {
		return nil
	}
	if token != k.token {
		k.took(token, c.issued(), c.expires())
	}
	return c
}

// took remembers a token, which is to be replaced when half of its life is over.
func (k *tokenKeeper) took(token string, from, until time.Time) {
	life := float64(until.Sub(from))
	k.token, k.renew = token, from.Add(time.Duration(life/2+k.jitter*life/10))
}

// is gives what is in the file, where that is as this has written it.
func (k *tokenKeeper) is() string {
	if st, err := os.Lstat(k.path); err != nil || st.Mode() != 0o600 {
		return ""
	}
	data, err := os.ReadFile(k.path)
	if err != nil {
		return ""
	}
	return string(data)
}

// write has the file be token, unless it is.
func (k *tokenKeeper) write(token string) (err error) {
	if k.is() == token {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep the token for the plugin's kubeconfig: %w", err)
		}
	}()
	// Not WriteFile, which keeps the mode of the file that there is.
	f, err := renameio.NewPendingFile(k.path, renameio.WithTempDir(filepath.Dir(k.path)), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return err
	}
	defer func() { _ = f.Cleanup() }() // nothing, once it has its name
	if _, err := f.WriteString(token); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}

// another mints a token that outlives the pod.
func (k *tokenKeeper) another(ctx context.Context, pods *claims) (token string, expires time.Time, err error) {
	namespace, account, ok := pods.account()
	if !ok {
		return "", time.Time{}, errNoAccount
	}
	ctx, cancel := context.WithTimeout(ctx, mintTimeout)
	defer cancel()
	if token, expires, err = k.mint(ctx, namespace, account); err != nil {
		return "", time.Time{}, fmt.Errorf("create a token of service account %s/%s: %w", namespace, account, err)
	}
	c := parseClaims(token)
	if c == nil {
		return "", time.Time{}, errors.New("the API server gave a token that does not say when it expires")
	}
	if until := time.Now().Add(tokenMargin); !c.expires().After(until) || !expires.After(until) {
		return "", time.Time{}, fmt.Errorf("the API server gave a token until %s, which by this node's clock is past or not %s away: look whether the clock is right",
			expires.UTC().Format(time.RFC3339), tokenMargin)
	}
	return token, expires, nil
}

// errNoAccount is of an agent that does not run as a pod.
var errNoAccount = errors.New("it is not one of a service account that expires")

// complain says once for each kind of failure what the plugin has in place of
// what it should.
func (k *tokenKeeper) complain(err error, held *claims) {
	kind := fmt.Sprint(held != nil, errors.Is(err, errNoAccount), apierrors.ReasonForError(err))
	if kind == k.told {
		return
	}
	k.told = kind
	switch {
	case held != nil:
		k.log.Warn("the token of the plugin's kubeconfig can't be renewed yet, and is tried again", "error", err,
			"expires", held.expires().UTC().Format(time.RFC3339), "remedy", remedy(err))
	case errors.Is(err, errNoAccount):
		k.log.Info("the plugin's kubeconfig has the agent's own token", "because", err)
	default:
		k.log.Warn("the plugin's kubeconfig has the token of the agent's pod, which is refused soon after the pod is gone: "+
			"pods of the mesh that start while there is no agent fail until there is one. Another token is tried for again", "error", err, "remedy", remedy(err))
	}
}

func remedy(err error) string {
	if apierrors.IsForbidden(err) {
		return "allow create of serviceaccounts/token by the account's own name, as the chart's Role does"
	}
	return "none, where the API server is down or was just started; else look why it says so"
}

// claims are what a service account's token says of itself. Its signature is the
// API server's to check.
type claims struct {
	Issuer     string  `json:"iss"`
	Subject    string  `json:"sub"`
	IssuedAt   float64 `json:"iat"` // seconds since 1970, as Expires
	Expires    float64 `json:"exp"`
	Kubernetes struct {
		Pod            *struct{} `json:"pod"`
		ServiceAccount struct {
			UID string `json:"uid"`
		} `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

// parseClaims gives nil for what is no token that expires.
func parseClaims(token string) *claims {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil
	}
	c := &claims{}
	if json.Unmarshal(data, c) != nil || c.Expires <= 0 {
		return nil
	}
	return c
}

func (c *claims) issued() time.Time  { return time.Unix(int64(c.IssuedAt), 0) }
func (c *claims) expires() time.Time { return time.Unix(int64(c.Expires), 0) }

// account is the service account that the token is of.
func (c *claims) account() (namespace, name string, ok bool) {
	if c == nil {
		return "", "", false
	}
	rest, ok := strings.CutPrefix(c.Subject, "system:serviceaccount:")
	if !ok {
		return "", "", false
	}
	namespace, name, ok = strings.Cut(rest, ":")
	return namespace, name, ok && namespace != "" && name != ""
}
