# The same steps as CI: each recipe runs its namesake in .ci/run, where the commands are.

export CARGO_TARGET_DIR := env("CARGO_TARGET_DIR", justfile_directory() / "target")

# List the recipes
default:
    @just --list

# Format the code
fmt:
    @bash .ci/run fmt

# Say what is not formatted
fmt-check:
    @bash .ci/run fmt-check

# cargo clippy --workspace --all-targets, with warnings denied
lint:
    @bash .ci/run lint

# cargo test --workspace
test:
    @bash .ci/run test

# Build the documentation of the crates, with warnings denied
doc:
    @bash .ci/run doc

# Check bans, licences and sources of the dependencies (deny.toml)
deny:
    @bash .ci/run deny

# Run every fuzz target for ten seconds
fuzz-brief:
    @bash .ci/run fuzz-brief

# Run the demo: broker, device, sensor and worker in one process
demo:
    @bash .ci/run demo

# Attack the delivery contract for ten minutes, or as the arguments say: `just soak --duration 8h`.
# Not a step of .ci/run: CI runs the short form, a test of the cli.
soak *args:
    cargo build --release -p selvedge-cli
    cargo run --release -p selvedge-tests --bin soak -- --broker {{ CARGO_TARGET_DIR }}/release/selvedge {{ args }}

# Attack a bridge to mosquitto for ten minutes, or as the arguments say:
# `just bridge-soak --seconds 120 --rate 1000 --qos 2 --json`. CI runs the short form, a test of the cli.
bridge-soak *args:
    cargo build --release -p selvedge-cli
    cargo run --release -p selvedge-tests --bin bridge-soak -- --binary {{ CARGO_TARGET_DIR }}/release/selvedge {{ args }}

# MQTT clients of other makes, from their registries, against `selvedge dev`
interop:
    cargo build -p selvedge-cli
    tests/interop/mqtt/run {{ CARGO_TARGET_DIR }}/debug/selvedge

# The interoperability suites of paho.mqtt.testing: `just paho path/to/interoperability`
paho suite:
    cargo build -p selvedge-cli
    tests/conformance/paho.sh {{ suite }} {{ CARGO_TARGET_DIR }}/debug/selvedge

# Everything CI runs, in its order
ci:
    @bash .ci/run
