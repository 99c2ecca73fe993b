# Every test that boots no guest.
{ lib, rustPlatform }:

rustPlatform.buildRustPackage {
  pname = "nixvmm-unit-tests";
  version = (lib.importTOML ../../Cargo.toml).workspace.package.version;

  # The handbook is compared with the program.
  src = import ./source.nix {
    inherit lib;
    also = [ ../handbook/src ];
  };
  cargoLock.lockFile = ../../Cargo.lock;
  cargoBuildFlags = [ "--package=nixvmm" ];
  cargoTestFlags = [
    "--workspace"
    "--exclude=tests"
  ];
}
