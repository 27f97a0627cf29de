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

# Everything CI runs, in its order
ci:
    @bash .ci/run
