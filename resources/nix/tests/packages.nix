# Packages that are nothing but their paths: below `store`, where a test may have put files.
{ lib, store }:

let
  package =
    name: attributes:
    {
      type = "derivation";
      inherit name;
      outPath = "${store}/${name}";
      drvPath = "${store}/${name}.drv";
      version = "6.12";
      meta = { };
      override = _: package name attributes;
      overrideAttrs = _: package name attributes;
    }
    // attributes;

  # What a builder would do is kept as text.
  built =
    name: attributes: script:
    package name (
      (attributes.passthru or { })
      // {
        inherit script;
        passthru = attributes.passthru or { };
      }
      // lib.optionalAttrs (attributes ? meta) { inherit (attributes) meta; }
    );

  named = lib.genAttrs [
    "alioth"
    "bash"
    "btrfs-progs"
    "bubblewrap"
    "cloud-hypervisor"
    "coreutils"
    "coreutils-full"
    "crosvm"
    "dosfstools"
    "e2fsprogs"
    "erofs-utils"
    "firecracker"
    "initrd"
    "iproute2"
    "kmod"
    "kvmtool"
    "linux"
    "nix"
    "nixfmt-tree"
    "nixvmm"
    "passt"
    "qemu_kvm"
    "qemu"
    "qemu-utils"
    "squashfs-tools-ng"
    "stratovirt"
    "systemd"
    "toplevel"
    "vfkit"
    "virtiofsd"
    "xfsprogs"
  ] (name: package name { });

  pkgs = named // {
    inherit lib;
    _type = "pkgs";
    # Where evaluations of a system begin.
    path = ./.;
    stdenv.hostPlatform = {
      system = "x86_64-linux";
      isx86_64 = true;
      isLinux = true;
      isDarwin = false;
      linux-kernel.target = "bzImage";
    };
    stdenv.targetPlatform = pkgs.stdenv.hostPlatform;
    buildPackages = pkgs;
    pkgsStatic = pkgs;
    testers.runNixOSTest = test: package "vm-test-run-${test.name}" { inherit test; };
    callPackage = file: _: package (lib.removeSuffix ".nix" (baseNameOf file)) { };
    closureInfo = _: package "closure-info" { };
    writeClosure = _: package "closure" { };
    runCommand = built;
    runCommandLocal = built;
    writeText = name: text: package name { inherit text; };
    writeShellScript = name: text: package name { inherit text; };
    writeShellScriptBin = name: text: package name { inherit text; };
    runtimeShell = "${store}/bash/bin/bash";
  };
in
pkgs
