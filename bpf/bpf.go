// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the eBPF programs' source and the Go mirror of their types. It
// knows sockets, addresses and maps; nothing of Kubernetes. The compiled programs
// are package object's, and with them the library that loads them: the plugin,
// which is started for each pod and loads none, is the quicker without.
package bpf

import (
	"encoding/binary"
	"fmt"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-dir object -go-package object -type pod -type pod_flag -type dest -type dest_key -type dest_flag -type port_key -type port_flag -type direction -type pod_state -type error_key -type place -type rule -type listener_key -type listener_kind -type tuple -type handshake -type sock_state -type adoption -type event Shunt shunt.bpf.c -- -O2 -Wall -Werror -mcpu=v3 -Iheaders -I/usr/include/x86_64-linux-gnu
//go:generate go run shunt.dev/shunt/bpf/prepare stamp object/shunt_bpfel.o shunt_stamp stamp_bpfel.go
//go:generate go run shunt.dev/shunt/bpf/prepare types object/shunt_bpfel.go types_bpfel.go

// License is the programs', for loading Stamp.
const License = "Dual BSD/GPL"

// Layout says what the programs of two builds must have in common to work on the
// same maps: "name=digest" for each map and for the stamp program, in one line of
// text. Types and sizes are seen by the digests. A change that they don't show, to
// what entries mean or to what programs expect of one another, raises "meaning".
const Layout = "meaning=1 " + mapLayout

// insnSize is the size of an instruction; a 64-bit load takes two.
const insnSize = 8

type mapLoad struct {
	insn int // index of the instruction
	name string
}

// Stamp gives the instructions of the stamp program for a slot; mapFD gives the
// descriptor of a map by its name.
func Stamp(slot uint32, mapFD func(name string) (int, error)) ([]byte, error) {
	code := []byte(stampCode)
	imm := func(insn int) []byte { return code[insn*insnSize+4 : insn*insnSize+8] }
	for _, m := range stampMaps {
		fd, err := mapFD(m.name)
		if err != nil {
			return nil, fmt.Errorf("map %s of the stamp program: %w", m.name, err)
		}
		binary.LittleEndian.PutUint32(imm(m.insn), uint32(fd))
	}
	for _, insn := range stampSlots {
		binary.LittleEndian.PutUint32(imm(insn), slot)
		binary.LittleEndian.PutUint32(imm(insn+1), 0)
	}
	return code, nil
}
