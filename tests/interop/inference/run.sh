#!/usr/bin/env bash
# Unmodified clients of Triton and OpenAI against `selvedge dev`, and a real MLServer behind a worker.
#
#   bash tests/interop/inference/run.sh [PATH-OF-SELVEDGE] [PATH-OF-CHAT-ECHO]
#
# The virtual environments are made outside the clone: SELVEDGE_TOOLS_DIR, default
# ~/.cache/selvedge-tools. SELVEDGE_MLSERVER=1 also tries MLServer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../../target}
selvedge=${1:-$target/debug/selvedge}
chat=${2:-$target/debug/chat-echo}
tools=${SELVEDGE_TOOLS_DIR:-$HOME/.cache/selvedge-tools}

venv() { # name requirements
    local dir=$tools/$1
    if ! cmp -s "$2" "$dir/requirements.txt"; then
        python3 -m venv "$dir"
        "$dir/bin/pip" -q install -r "$2"
        cp "$2" "$dir/requirements.txt"
    fi
    echo "$dir/bin/python"
}

python=$(venv inference-clients "$here/requirements.txt")
dir=$(mktemp -d)
children=()
stop() {
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    wait
    rm -rf "$dir"
}
trap stop EXIT

"$selvedge" dev --dir "$dir/fabric" --quic 127.0.0.1:0 --mqtt 127.0.0.1:0 --mqtts 127.0.0.1:0 \
    --admin 127.0.0.1:0 --grpc 127.0.0.1:0 --http 127.0.0.1:0 >"$dir/out" 2>"$dir/log" &
children+=($!)
for _ in $(seq 300); do
    grep -qs '^ready' "$dir/out" && break
    kill -0 "${children[0]}" || { cat "$dir/log"; exit 1; }
    sleep 0.1
done
value() { sed -n "s/^$1=//p" "$dir/out" | head -1; }

"$chat" --broker "$(value quic)" --pki "$dir/fabric/pki" >"$dir/chat" &
children+=($!)
for _ in $(seq 100); do
    grep -qs '^ready' "$dir/chat" && break
    sleep 0.1
done

"$python" "$here/clients.py" "$(value grpc)" "$(value http)" "$dir/fabric"

if [[ ${SELVEDGE_MLSERVER:-} == 1 ]]; then
    mlserver=$(venv mlserver "$here/requirements-mlserver.txt")
    cp -r "$here/mlserver" "$dir/mlserver"
    (cd "$dir/mlserver" && exec "$(dirname "$mlserver")/mlserver" start .) >"$dir/mlserver.log" 2>&1 &
    children+=($!)
    cat >"$dir/worker.toml" <<TOML
tier = "cloud"
[connect]
broker = "$(value quic)"
server_name = "localhost"
ca = "fabric/pki/ca.pem"
cert = "fabric/pki/dev/local/admin/cert.pem"
key = "fabric/pki/dev/local/admin/key.pem"
[[model]]
name = "mlserver/sum"
slots = 2
[model.upstream]
kind = "open-inference"
url = "http://127.0.0.1:18081"
model = "sum"
TOML
    "$selvedge" worker --config "$dir/worker.toml" >"$dir/worker.log" 2>&1 &
    children+=($!)
    "$python" "$here/upstream.py" "$(value grpc)" "$dir/fabric" || {
        cat "$dir/worker.log"
        tail -30 "$dir/mlserver.log"
        exit 1
    }
fi
