package evidence

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"time"

	"hauberk.dev/api/node"
)

// receiptType separates receipts from everything else a node's key signs.
const receiptType = "application/vnd.hauberk.receipt.v1"

// receiptBytes are what the signature of a receipt covers: every field but the
// signature, each with its length before it, so that no two receipts share
// their bytes and no JSON library decides.
func receiptBytes(r node.Receipt) []byte {
	var b bytes.Buffer
	for _, f := range []string{
		strconv.FormatUint(r.Epoch, 10), r.Instance, r.Point, r.Node, r.Act,
		r.At.UTC().Format(time.RFC3339Nano),
	} {
		fmt.Fprintf(&b, "%d %s\n", len(f), f)
	}
	return PAE(receiptType, b.Bytes())
}

// SignReceipt returns the receipt with its signature.
func SignReceipt(r node.Receipt, s Signer) (node.Receipt, error) {
	if err := checkReceipt(r); err != nil {
		return node.Receipt{}, fmt.Errorf("sign receipt: %w", err)
	}
	sig, err := s.Sign(receiptBytes(r))
	if err != nil {
		return node.Receipt{}, fmt.Errorf("sign receipt: %w", err)
	}
	r.Signature = base64.StdEncoding.EncodeToString(sig)
	return r, nil
}

// VerifyReceipt checks that one of the keys, which are those of r.Node, signed
// the receipt.
func VerifyReceipt(r node.Receipt, keys ...Key) error {
	if len(keys) == 0 {
		return fmt.Errorf("verify receipt of %s: %w", r.Node, ErrNoKeys)
	}
	if err := checkReceipt(r); err != nil {
		return fmt.Errorf("verify receipt: %w", err)
	}
	sig, err := base64.StdEncoding.Strict().DecodeString(r.Signature)
	if err != nil || len(sig) == 0 || len(sig) > 1024 {
		return fmt.Errorf("verify receipt of %s: signature %.40q is not base64 of 1 to 1024 bytes", r.Node, r.Signature)
	}
	message := receiptBytes(r)
	for _, k := range keys {
		if k.verify(message, sig) {
			return nil
		}
	}
	return fmt.Errorf("verify receipt: epoch %d, point %s, node %s: not signed by %v; the node must sign with the key it was enrolled with", r.Epoch, r.Point, r.Node, keys)
}

func checkReceipt(r node.Receipt) error {
	switch {
	case r.Node == "" || r.Point == "" || r.Act == "":
		return fmt.Errorf("node %q, point %q and act %q must all be set", r.Node, r.Point, r.Act)
	case len(r.Node) > 253 || len(r.Point) > 64 || len(r.Act) > 1024 || len(r.Instance) > 128:
		return errors.New("a field is too long (node 253, point 64, act 1024, instance 128)")
	case r.At.IsZero():
		return errors.New("field at is not set")
	}
	return nil
}
