// SPDX-License-Identifier: Apache-2.0

// Command testreport reads `go test -json` and prints what a person wants to
// know of it: a line for each package, the output of what failed, and every
// skip with its reason. It fails when a test failed, when a package did not
// end, when nothing ran, and on every skip that is not on a list.
//
//	go test -json ./... | testreport -allow FILE [-tally FILE]
//	testreport -sum FILE
package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	allow := flag.String("allow", "", "`file` with the skips that are allowed")
	tallyTo := flag.String("tally", "", "`file` to add this run's numbers to")
	sum := flag.String("sum", "", "sum up the numbers in `file`, and read no tests")
	flag.Parse()
	run := func() error { return readRun(*allow, *tallyTo) }
	if *sum != "" {
		run = func() error { return printSum(*sum) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
}

func readRun(allow, tallyTo string) error {
	allowed := map[string]bool{}
	if allow != "" {
		f, err := os.Open(allow)
		if err != nil {
			return err
		}
		defer f.Close()
		if allowed, err = readAllowed(f); err != nil {
			return fmt.Errorf("%s: %w", allow, err)
		}
	}
	r := newReport(os.Stdout, allowed)
	if err := r.read(os.Stdin); err != nil {
		return err
	}
	fmt.Println("this run:", r.tally)
	if tallyTo != "" {
		f, err := os.OpenFile(tallyTo, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := fmt.Fprintln(f, r.tally); err != nil {
			return err
		}
	}
	return r.verdict()
}

func printSum(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	t, err := readTallies(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	fmt.Println(t)
	return nil
}
