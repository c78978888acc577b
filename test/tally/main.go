// Command tally runs go test -json, shows what happens as it happens, and
// counts it.
//
// Several runs, also at the same time, are recorded in one directory; the sum
// over them fails if anything failed, if nothing ran, or if a test that must run
// was skipped or is gone.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, errFailed) { // told, above the line that counts
			fmt.Fprintln(os.Stderr, "tally:", err)
		}
		os.Exit(1)
	}
}

// errFailed means that the tests failed and that this has been told.
var errFailed = errors.New("tests failed")

func run(args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("tally", flag.ContinueOnError)
	f.SetOutput(stderr)
	record := f.String("record", "", "directory that events are written to")
	sum := f.Bool("sum", false, "count the record instead of running a command")
	must := f.String("must", "", "with -sum: file of tests that must have passed, one \"package test\" a line")
	if err := f.Parse(args); err != nil {
		return err
	}
	switch {
	case *record == "":
		return errors.New("name a -record")
	case *sum:
		return total(*record, *must, stdout)
	case f.NArg() == 0:
		return errors.New("no command: tally -record DIR -- go test -json PACKAGE")
	}
	if err := os.MkdirAll(*record, 0o755); err != nil {
		return err
	}
	file, err := os.CreateTemp(*record, "*.json")
	if err != nil {
		return err
	}
	defer file.Close()
	return watch(exec.Command(f.Arg(0), f.Args()[1:]...), file, stdout, stderr)
}

// watch runs a command and tells of each package as it ends.
func watch(cmd *exec.Cmd, record, stdout, stderr io.Writer) error {
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c := newCount()
	c.told = stdout
	readErr := c.read(io.TeeReader(out, record))
	if readErr != nil { // let the command end, whatever it goes on to say
		_, _ = io.Copy(io.Discard, out)
	}
	return errors.Join(cmd.Wait(), readErr)
}

// total reads the records and prints the line that counts.
func total(record, must string, stdout io.Writer) error {
	files, err := filepath.Glob(filepath.Join(record, "*.json"))
	if err != nil {
		return err
	}
	c := newCount()
	for _, name := range files {
		if err := c.readFile(name); err != nil {
			return err
		}
	}
	var required []test
	if must != "" {
		if required, err = readMust(must); err != nil {
			return err
		}
	}
	return c.report(stdout, required)
}

func (c *count) readFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return c.read(f)
}
