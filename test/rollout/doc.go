// Package rollout brings a policy to twenty real sandboxes in stages, has it
// halted, lowered and rolled back by the commands that people type, and reads in
// the ledger that every act was recorded.
//
// It holds tests only.
package rollout
