// SPDX-License-Identifier: Apache-2.0

// Package load is what package loader and package loader/programs have to tell one
// another.
package load

import "errors"

// A Request says how the programs are to be loaded.
type Request struct {
	// Dir is where to pin what is loaded; for LoadTC, where all else is pinned.
	Dir string
	// Maps are the paths of pinned maps, by their names, that take the place of the
	// programs' own.
	Maps map[string]string
	// See loader.Options; 0 is the default of the programs.
	InflightLimit uint32
	MaxPrefixes   uint32 // of the prefix maps
}

// Programs loads the programs into the kernel.
type Programs interface {
	// Load loads and pins all programs but the TC program, and all maps. It fails
	// with ErrIncompatible where a map of Maps is not as the programs have it.
	Load(r Request) error
	// LoadTC loads the TC program with what Load has pinned, and pins it.
	LoadTC(r Request) error
}

// What it means that something was not loaded.
var (
	ErrPermission   = errors.New("no permission")
	ErrRefused      = errors.New("the kernel refuses the datapath")
	ErrIncompatible = errors.New("another build's maps are not as it says")
)

// The map of the variable that switches tracing on, and its pin's name: bpffs
// refuses names with a dot.
const (
	TracingMap = ".data.trace"
	TracingPin = "tracing"
)
