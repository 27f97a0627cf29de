//! Compiles the schemas with a compiler in Rust, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut schemas = vec!["proto/selvedge.proto"];
    if std::env::var_os("CARGO_FEATURE_OPEN_INFERENCE").is_some() {
        schemas.push("proto/open_inference.proto");
    }
    let descriptors = protox::compile(schemas, ["proto"])?;
    prost_build::Config::new()
        .bytes(["."])
        .btree_map([".inference"])
        .compile_fds(descriptors)?;
    Ok(())
}
