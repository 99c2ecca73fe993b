# The nixvmm program with its man page and shell completions. Called with pkgsStatic it is one static file.
{
  lib,
  stdenv,
  rustPlatform,
  installShellFiles,
  buildPackages,
}:

rustPlatform.buildRustPackage {
  pname = "nixvmm";
  version = (lib.importTOML ../../Cargo.toml).workspace.package.version;

  src = import ./source.nix { inherit lib; };
  cargoLock.lockFile = ../../Cargo.lock;
  cargoBuildFlags = [ "--package=nixvmm" ];

  # Unit tests need processes and eventfds only; they are a check of their own (unit-tests.nix).
  doCheck = false;

  nativeBuildInputs = [ installShellFiles ];

  # Called by this name it takes the flags of microvm.nix's command.
  postInstall =
    "ln -s nixvmm $out/bin/microvm\n"
    + lib.optionalString (stdenv.hostPlatform.emulatorAvailable buildPackages) ''
      nixvmm=${stdenv.hostPlatform.emulator buildPackages}\ $out/bin/nixvmm
      $nixvmm man > nixvmm.1
      installManPage nixvmm.1
      for shell in bash fish zsh; do
        $nixvmm completions $shell > completion.$shell
        installShellCompletion --cmd nixvmm --$shell completion.$shell
      done
    '';

  meta = {
    description = "Virtual machine monitor for lightweight NixOS guests";
    license = lib.licenses.asl20;
    mainProgram = "nixvmm";
    platforms = [ "x86_64-linux" ];
  };
}
