// SPDX-License-Identifier: Apache-2.0

package netconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
)

// prevResult is what is read of a prevResult; the rest passes unread.
type prevResult struct {
	CNIVersion *string `json:"cniVersion"`
	Interfaces []*struct {
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
	IPs []*struct {
		Address   string `json:"address"`
		Interface *int   `json:"interface"`
	} `json:"ips"`
}

// resultVersions have the form above; earlier ones have ip4 and ip6.
var resultVersions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

func undecodable(format string, args ...any) error {
	return types.NewError(types.ErrDecodingFailure, "parse prevResult: "+fmt.Sprintf(format, args...), "")
}

func (c *Config) prev() (*prevResult, error) {
	var p prevResult
	if err := json.Unmarshal(c.PrevResult, &p); err != nil {
		return nil, undecodable("%v", err)
	}
	if p.CNIVersion != nil && !slices.Contains(resultVersions, *p.CNIVersion) {
		return nil, undecodable("cniVersion: %q is not one of %v", *p.CNIVersion, resultVersions)
	}
	// The library that converts results follows each pointer.
	if i := slices.Index(p.Interfaces, nil); i >= 0 {
		return nil, undecodable("interfaces[%d]: null is not an interface", i)
	}
	if i := slices.Index(p.IPs, nil); i >= 0 {
		return nil, undecodable("ips[%d]: null is not an address", i)
	}
	return &p, nil
}

// PrevAddrs returns the addresses of the pod's own interfaces by prevResult:
// those on an interface with a sandbox, and those on none in particular. It
// returns none without a prevResult. Its errors are of code 6.
func (c *Config) PrevAddrs() ([]netip.Addr, error) {
	if c.PrevResult == nil {
		return nil, nil
	}
	p, err := c.prev()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for i, ip := range p.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return nil, undecodable("ips[%d].address: %q is not an address with its prefix length", i, ip.Address)
		}
		if ip.Interface != nil {
			n := *ip.Interface
			if n < 0 || n >= len(p.Interfaces) {
				return nil, undecodable("ips[%d].interface: %d is not the index of one of its %d interfaces", i, n, len(p.Interfaces))
			}
			if p.Interfaces[n].Sandbox == "" {
				continue // on the host's side
			}
		}
		if addr := prefix.Addr().Unmap(); !slices.Contains(out, addr) {
			out = append(out, addr)
		}
	}
	return out, nil
}

// Result returns what ADD prints: prevResult byte for byte, converted only
// where it is of another version than the configuration; an empty result when
// there is none. Its errors are of code 6.
func (c *Config) Result() ([]byte, error) {
	if c.PrevResult == nil {
		return []byte(`{"cniVersion":"` + c.CNIVersion + `"}`), nil
	}
	p, err := c.prev()
	if err != nil {
		return nil, err
	}
	if p.CNIVersion == nil { // it can only be of the version that it was passed in
		return withVersion(c.PrevResult, c.CNIVersion), nil
	}
	if *p.CNIVersion == c.CNIVersion {
		return c.PrevResult, nil
	}
	res, err := create.Create(*p.CNIVersion, c.PrevResult)
	if err != nil {
		return nil, undecodable("%v", err)
	}
	if res, err = res.GetAsVersion(c.CNIVersion); err != nil {
		return nil, undecodable("convert it from version %s to %s: %v", *p.CNIVersion, c.CNIVersion, err)
	}
	var out bytes.Buffer
	if err := res.PrintTo(&out); err != nil {
		return nil, undecodable("print it as version %s: %v", c.CNIVersion, err)
	}
	return out.Bytes(), nil
}

// withVersion puts a cniVersion before the other members of the object raw.
func withVersion(raw []byte, version string) []byte {
	inner := bytes.TrimLeft(raw, " \t\r\n")[1:]
	out := append([]byte(`{"cniVersion":"`), version...)
	out = append(out, '"')
	if rest := bytes.TrimLeft(inner, " \t\r\n"); rest[0] != '}' {
		out = append(out, ',')
	}
	return append(out, inner...)
}
