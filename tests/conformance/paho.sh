#!/bin/sh
# Runs the interoperability suites of Eclipse paho.mqtt.testing, 3.1.1 and 5.0, against `selvedge dev`,
# in the clear and over TLS, with the settings that docs/mqtt.md gives.
#
#   git clone https://github.com/eclipse/paho.mqtt.testing
#   tests/conformance/paho.sh paho.mqtt.testing/interoperability [path of the selvedge binary]
#
# The suites are not part of this repository. They need Python 3. A suite that waits for ever is ended
# after SECONDS_EACH seconds, 240 by default.
set -eu

suite=$(cd "$1" && pwd)
selvedge=${2:-target/debug/selvedge}
case $selvedge in /*) ;; *) selvedge=$PWD/$selvedge ;; esac
here=$(cd "$(dirname "$0")" && pwd)
seconds=${SECONDS_EACH:-240}
work=$(mktemp -d)
broker= forward=
stop() {
    [ -z "$forward" ] || kill "$forward" 2>/dev/null || true
    [ -z "$broker" ] || kill "$broker" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT INT TERM

start() {
    # One thread: docs/mqtt.md says why.
    TOKIO_WORKER_THREADS=1 "$selvedge" dev --dir "$work/dev" --quic 127.0.0.1:0 --mqtt 127.0.0.1:0 --mqtts 127.0.0.1:0 \
        --admin 127.0.0.1:0 >"$work/log" 2>&1 &
    broker=$!
    tries=0
    until grep -q '^ready' "$work/log"; do
        tries=$((tries + 1))
        if [ $tries -gt 600 ] || ! kill -0 "$broker" 2>/dev/null; then
            cat "$work/log" >&2
            exit 1
        fi
        sleep 0.1
    done
}

# The first start makes the configuration, which is then what docs/mqtt.md says.
start
kill "$broker"
wait "$broker" || true
sed -i '/^\[mqtt\]/r '"$here/paho-mqtt.toml" "$work/dev/broker.toml"
cat "$here/paho-policy.toml" >>"$work/dev/policy.toml"
start
plain=$(sed -n 's/^mqtt=.*://p' "$work/log")
tls=$(sed -n 's/^mqtts=.*://p' "$work/log")
pki=$work/dev/pki
python3 "$here/tls-forward.py" "$tls" "$pki/ca.pem" "$pki/dev/local/admin/cert.pem" \
    "$pki/dev/local/admin/key.pem" >"$work/forward" &
forward=$!
until [ -s "$work/forward" ]; do sleep 0.1; done
over_tls=$(cat "$work/forward")

failed=0
cd "$suite"
for port in "$plain" "$over_tls"; do
    for name in client_test client_test5; do
        carrier=plaintext
        [ "$port" = "$plain" ] || carrier=TLS
        if timeout "$seconds" python3 "$here/paho.py" "$name" "$port" >"$work/out" 2>&1; then
            verdict=passes
        else
            verdict=FAILS
            failed=1
        fi
        echo "$name over $carrier: $verdict: $(grep '^Ran \|^OK\|^FAILED' "$work/out" | tr '\n' ' ')"
        [ $verdict = passes ] || cat "$work/out" >&2
    done
done
exit $failed
