package token

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// pair is a key of each algorithm, and the set of their public halves.
type pair struct {
	ec  *ecdsa.PrivateKey
	rsa *rsa.PrivateKey
	ed  ed25519.PrivateKey
	set string
}

func newPair(t testing.TB) pair {
	t.Helper()
	var p pair
	var err error
	if p.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if p.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	if _, p.ed, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	point, err := p.ec.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	p.set = fmt.Sprintf(`{"keys":[
		{"kty":"EC","crv":"P-256","kid":"e","use":"sig","x":%q,"y":%q},
		{"kty":"RSA","kid":"r","alg":"RS256","n":%q,"e":%q},
		{"kty":"OKP","crv":"Ed25519","kid":"d","x":%q},
		{"kty":"EC","crv":"P-384","kid":"other","x":"AA","y":"AA"},
		{"kty":"RSA","kid":"enc","use":"enc","n":"AA","e":"AQAB"}]}`,
		b64(point[1:33]), b64(point[33:]), b64(p.rsa.N.Bytes()), b64(big.NewInt(int64(p.rsa.E)).Bytes()), b64(p.ed.Public().(ed25519.PublicKey)))
	return p
}

func (p pair) issuer(t testing.TB) *Issuer {
	t.Helper()
	keys, err := ParseKeys([]byte(p.set))
	if err != nil {
		t.Fatal(err)
	}
	if keys.Len() != 3 {
		t.Fatalf("%d keys were taken; want 3", keys.Len())
	}
	return &Issuer{Name: "https://issuer.test", Audiences: []string{"bank", "vault"}, Keys: keys, Skew: time.Minute}
}

func good() jwt.MapClaims {
	return jwt.MapClaims{"iss": "https://issuer.test", "aud": "bank", "exp": time.Now().Add(time.Hour).Unix(), "role": "teller", "groups": []string{"a", "b"}}
}

// sign has a library of others sign a token.
func sign(t testing.TB, method jwt.SigningMethod, kid string, claims jwt.MapClaims, key any) string {
	t.Helper()
	j := jwt.NewWithClaims(method, claims)
	if kid != "" {
		j.Header["kid"] = kid
	}
	s, err := j.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestGood takes what a library of others has signed, with each algorithm.
func TestGood(t *testing.T) {
	p := newPair(t)
	i := p.issuer(t)
	for _, c := range []struct {
		method jwt.SigningMethod
		kid    string
		key    any
	}{{jwt.SigningMethodES256, "e", p.ec}, {jwt.SigningMethodRS256, "r", p.rsa}, {jwt.SigningMethodEdDSA, "d", p.ed}, {jwt.SigningMethodES256, "", p.ec}} {
		text := sign(t, c.method, c.kid, good(), c.key)
		got, err := i.Verify(text)
		if err != nil {
			t.Errorf("%s: %v", c.method.Alg(), err)
			continue
		}
		if err := got.Check(time.Now()); err != nil || got.Claims["role"] != "teller" || len(Texts(got.Claims["groups"])) != 2 {
			t.Errorf("%s: %v, %v", c.method.Alg(), got.Claims, err)
		}
		if name := Unverified(text); name != "https://issuer.test" {
			t.Errorf("unverified issuer %q", name)
		}
	}
}

// TestVectors are the tokens of RFC 7515 appendices A.2 and A.3 and of RFC 8037
// appendix A.4: their signatures are checked, their claims have no audience.
func TestVectors(t *testing.T) {
	for name, c := range map[string]struct{ key, alg, token string }{
		"ES256": {`{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`, ES256,
			"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"},
		"EdDSA": {`{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`, EdDSA,
			"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"},
	} {
		keys, err := ParseKeys([]byte(`{"keys":[` + c.key + `]}`))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		signed, signature, _ := cutLast(c.token)
		raw, err := encoding.DecodeString(signature)
		if err != nil {
			t.Fatal(err)
		}
		if err := keys.verify(c.alg, "", false, signed, raw); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if keys.verify(c.alg, "", false, signed+"x", raw) == nil {
			t.Errorf("%s: a changed text passed", name)
		}
	}
}

func TestRefused(t *testing.T) {
	p := newPair(t)
	i := p.issuer(t)
	other := newPair(t)
	with := func(change func(jwt.MapClaims)) jwt.MapClaims {
		c := good()
		change(c)
		return c
	}
	header := func(h string) string { // signed well, whatever it says
		text := b64([]byte(h)) + "." + strings.Split(sign(t, jwt.SigningMethodEdDSA, "d", good(), p.ed), ".")[1]
		return text + "." + b64(ed25519.Sign(p.ed, []byte(text)))
	}
	claims := func(c string) string {
		text := b64([]byte(`{"alg":"EdDSA","kid":"d"}`)) + "." + b64([]byte(c))
		return text + "." + b64(ed25519.Sign(p.ed, []byte(text)))
	}
	if _, err := i.Verify(header(`{"alg":"EdDSA","kid":"d"}`)); err != nil {
		t.Fatalf("the pattern of what follows: %v", err)
	}
	whole := sign(t, jwt.SigningMethodES256, "e", good(), p.ec)
	exp := time.Now().Add(time.Hour).Unix()
	for name, c := range map[string]struct{ text, want string }{
		"none":               {sign(t, jwt.SigningMethodNone, "", good(), jwt.UnsafeAllowNoneSignatureType), "algorithm"},
		"None":               {header(`{"alg":"None","kid":"d"}`), "algorithm"},
		"no alg":             {header(`{"kid":"d"}`), "algorithm"},
		"public key as HMAC": {sign(t, jwt.SigningMethodHS256, "r", good(), p.rsa.N.Bytes()), "algorithm"},
		"HMAC without kid":   {sign(t, jwt.SigningMethodHS256, "", good(), []byte(p.set)), "algorithm"},
		"PS256":              {sign(t, jwt.SigningMethodPS256, "r", good(), p.rsa), "algorithm"},
		"another's kid":      {sign(t, jwt.SigningMethodES256, "d", good(), p.ec), "algorithm"},
		"unknown kid":        {sign(t, jwt.SigningMethodES256, "x", good(), p.ec), "no key"},
		"another's key":      {sign(t, jwt.SigningMethodES256, "e", good(), other.ec), "signature"},
		"crit":               {header(`{"alg":"EdDSA","kid":"d","crit":["b64"],"b64":false}`), "crit"},
		"empty crit":         {header(`{"alg":"EdDSA","kid":"d","crit":[]}`), "crit"},
		"alg twice":          {header(`{"alg":"none","alg":"EdDSA","kid":"d"}`), "twice"},
		"kid a number":       {header(`{"alg":"EdDSA","kid":7}`), "kid"},
		"header a list":      {header(`[]`), "not an object"},
		"more after it":      {header(`{"alg":"EdDSA","kid":"d"}{}`), "follows"},
		"claims twice":       {claims(fmt.Sprintf(`{"iss":"https://issuer.test","aud":"bank","exp":%d,"role":"a","role":"b"}`, exp)), "twice"},
		"claims deep":        {claims(`{"a":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`), "levels"},
		"claims half":        {claims(`{"iss":`), "JSON"},
		"issuer":             {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { c["iss"] = "https://issuer.test/" }), p.ed), "issuer"},
		"no issuer":          {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { delete(c, "iss") }), p.ed), "issuer"},
		"audience":           {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { c["aud"] = []string{"shop"} }), p.ed), "audience"},
		"no audience":        {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { delete(c, "aud") }), p.ed), "audience"},
		"no end":             {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { delete(c, "exp") }), p.ed), "exp"},
		"end a text":         {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { c["exp"] = "9999999999" }), p.ed), "exp"},
		"end far away":       {claims(`{"iss":"https://issuer.test","aud":"bank","exp":1e300}`), "exp"},
		"huge":               {sign(t, jwt.SigningMethodEdDSA, "d", with(func(c jwt.MapClaims) { c["x"] = strings.Repeat("x", MaxToken) }), p.ed), "at most"},
		"two parts":          {whole[:strings.LastIndex(whole, ".")], "three parts"},
		"four parts":         {whole + ".AA", "three parts"},
		"empty":              {"", "three parts"},
		"dots":               {"..", "JSON"},
		"padded":             {whole + "=", "base64url"},
		"short signature":    {whole[:len(whole)-4], "signature"},
	} {
		got, err := i.Verify(c.text)
		if err == nil {
			t.Errorf("%s: taken: %v", name, got.Claims)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want it to speak of %q", name, err, c.want)
		}
	}
}

func TestTime(t *testing.T) {
	p := newPair(t)
	i := p.issuer(t)
	at := time.Unix(2_000_000_000, 0)
	c := good()
	c["nbf"], c["exp"] = at.Unix(), at.Unix()+100
	got, err := i.Verify(sign(t, jwt.SigningMethodES256, "e", c, p.ec))
	if err != nil {
		t.Fatal(err)
	}
	for after, ok := range map[time.Duration]bool{-61 * time.Second: false, -60 * time.Second: true, 0: true, 159 * time.Second: true, 160 * time.Second: false} {
		if err := got.Check(at.Add(after)); (err == nil) != ok {
			t.Errorf("%v after its beginning: %v", after, err)
		}
	}
}

func TestKeysRefused(t *testing.T) {
	for name, c := range map[string]struct{ set, want string }{
		"no JSON":     {"x", "want"},
		"no key":      {`{"keys":[]}`, "none for"},
		"no set":      {`{"kty":"RSA"}`, "none for"},
		"secret":      {`{"keys":[{"kty":"oct","kid":"s","k":"AAAA"}]}`, "secret"},
		"private":     {`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","d":"AA"}]}`, "secret"},
		"small RSA":   {`{"keys":[{"kty":"RSA","n":"` + b64(make([]byte, 128)) + `","e":"AQAB"}]}`, "bits"},
		"e is 1":      {`{"keys":[{"kty":"RSA","n":"` + b64(append([]byte{0xff}, make([]byte, 255)...)) + `","e":"AQ"}]}`, "odd"},
		"off curve":   {`{"keys":[{"kty":"EC","crv":"P-256","x":"` + b64(make([]byte, 32)) + `","y":"` + b64(make([]byte, 32)) + `"}]}`, "curve"},
		"short x":     {`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA"}]}`, "bytes"},
		"alg unfit":   {`{"keys":[{"kty":"OKP","crv":"Ed25519","alg":"RS256","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`, "alg"},
		"many":        {`{"keys":[` + strings.Repeat(`{},`, 16) + `{}]}`, "at most"},
		"large":       {strings.Repeat(" ", MaxKeySet+1), "at most"},
		"other kinds": {`{"keys":[{"kty":"EC","crv":"P-521"},{"kty":"new"}]}`, "none for"},
	} {
		if _, err := ParseKeys([]byte(c.set)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want it to speak of %q", name, err, c.want)
		}
	}
}

// FuzzToken has anybody write tokens: none is good, as nobody signs them, and
// none makes trouble.
func FuzzToken(f *testing.F) {
	p := newPair(f)
	i := p.issuer(f)
	c, _ := json.Marshal(good())
	for _, h := range []string{`{"alg":"none"}`, `{"alg":"ES256","kid":"e"}`, `{"alg":"EdDSA","crit":["x"]}`, `[`, `{"a":{"a":[1,2.5e3,null,true]}}`} {
		f.Add(b64([]byte(h)) + "." + b64(c) + "." + b64(make([]byte, 64)))
	}
	f.Add("..")
	f.Fuzz(func(t *testing.T, text string) {
		Unverified(text)
		if got, err := i.Verify(text); err == nil {
			t.Errorf("%q is taken: %v", text, got.Claims)
		}
	})
}

// FuzzKeys reads whatever stands in a file.
func FuzzKeys(f *testing.F) {
	f.Add([]byte(newPair(f).set))
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`))
	f.Fuzz(func(t *testing.T, set []byte) {
		if k, err := ParseKeys(set); err == nil && (k.Len() == 0 || k.Len() > maxKeys) {
			t.Errorf("%d keys", k.Len())
		}
	})
}
