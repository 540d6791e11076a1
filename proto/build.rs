fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=wire");
    let files = protox::compile(["wire/mesh.proto", "wire/local.proto", "wire/takeover.proto"], ["wire"])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
