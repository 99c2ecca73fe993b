# Every option that a guest has, with names, types and defaults as in microvm.nix.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    literalExpression
    mkEnableOption
    mkOption
    types
    ;

  cfg = config.microvm;
  hostName = config.networking.hostName or "$HOSTNAME";
  nixvmmLib = import ../lib { inherit lib; };
in
{
  imports = [
    ./device-options.nix
    ./hypervisor-options.nix
    ./nixvmm-options.nix
    (lib.mkRemovedOptionModule [ "microvm" "balloonMem" ] "Say `microvm.balloon = true;` instead.")
  ];

  options.microvm = {
    guest.enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether this system is made into a guest.";
    };

    optimize.enable = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether defaults favour a small closure and a fast start: no documentation, systemd in the initrd,
        networkd without waiting for the network, no programs to switch a system that cannot be switched.
      '';
    };

    hypervisor = mkOption {
      type = types.enum nixvmmLib.hypervisors;
      default = "nixvmm";
      description = ''
        The hypervisor that this configuration was written for. nixvmm runs the guest in any case; options
        of others are accepted, and a warning names those that nixvmm does not need or cannot follow.
      '';
    };

    cpu = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "A processor model to emulate, which nixvmm does not: the guest has the host's.";
    };

    vcpu = mkOption {
      type = types.ints.positive;
      default = 1;
      description = "Number of virtual processors. A network card has a queue pair for each, up to 16.";
    };

    mem = mkOption {
      type = types.ints.positive;
      default = 512;
      description = "RAM in MiB.";
    };

    hugepageMem = mkOption {
      type = types.bool;
      default = false;
      description = "Whether RAM is made of the host's explicit huge pages of 2 MiB.";
    };

    hotplugMem = mkOption {
      type = types.ints.unsigned;
      default = 0;
      description = "Memory in MiB that can be added to `mem` while the guest runs, rounded up to 128 MiB.";
    };

    hotpluggedMem = mkOption {
      type = types.ints.unsigned;
      default = cfg.hotplugMem;
      defaultText = literalExpression "config.microvm.hotplugMem";
      description = ''
        How much of `hotplugMem` the guest has from the start. It is RAM like the rest; set 0 for a guest
        whose memory shall shrink again to `mem`.
      '';
    };

    balloon = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the host may take memory from the guest. nixvmm guests always have a balloon, by which
        memory that the guest has freed goes back to the host by itself.
      '';
    };

    initialBalloonMem = mkOption {
      type = types.ints.unsigned;
      default = 0;
      description = "Size of the balloon in MiB at the start, which nixvmm does not set: see `microvm-balloon`.";
    };

    deflateOnOOM = mkOption {
      type = types.bool;
      default = true;
      description = "Whether a guest that has no other memory may take it from the balloon.";
    };

    preStart = mkOption {
      type = types.lines;
      default = "";
      description = "Shell lines that are run before the guest starts.";
    };

    extraArgsScript = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "A program that prints one line of further arguments when the guest starts.";
    };

    socket = mkOption {
      type = types.nullOr types.str;
      default = "${hostName}.sock";
      defaultText = literalExpression ''"''${config.networking.hostName}.sock"'';
      description = "The socket at which the guest is controlled; null for none, and no clean stop by it.";
    };

    user = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "A user to change to when started as root, which no unit of nixvmm is.";
    };

    kernel = mkOption {
      type = types.package;
      default = config.boot.kernelPackages.kernel;
      defaultText = literalExpression "config.boot.kernelPackages.kernel";
      description = "The kernel; better set `boot.kernelPackages`.";
    };

    initrdPath = mkOption {
      type = types.path;
      default = "${config.system.build.initialRamdisk}/${config.system.boot.loader.initrdFile}";
      defaultText = literalExpression ''"''${config.system.build.initialRamdisk}/''${config.system.boot.loader.initrdFile}"'';
      description = "The initial RAM disk.";
    };

    kernelParams = mkOption {
      type = types.listOf types.str;
      description = ''
        The kernel command line: `boot.kernelParams` and what names the system, which therefore cannot be
        part of the system itself.
      '';
    };

    prettyProcnames = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the process is called `microvm@` and the guest's name.";
    };

    vmHostPackages = mkOption {
      type = types.pkgs;
      default = if cfg.cpu == null then pkgs else pkgs.buildPackages;
      defaultText = literalExpression "if config.microvm.cpu == null then pkgs else pkgs.buildPackages";
      description = "The packages of the host, from which the runner is made.";
    };

    machineId = mkOption {
      type = types.nullOr types.str;
      # The text is that of microvm.nix: a guest keeps its identity when it moves.
      default =
        let
          hash = builtins.hashString "sha256" "microvm.nix:${hostName}";
          part = offset: length: builtins.substring offset length hash;
        in
        lib.concatStringsSep "-" [
          (part 0 8)
          (part 8 4)
          (part 12 4)
          (part 16 4)
          (part 20 12)
        ];
      defaultText = literalExpression "a hash of the host name";
      example = "7d9f1f05-9f5c-4f0b-8a35-0a6c2f0b5a11";
      description = "The guest's UUID: in SMBIOS, as its /etc/machine-id, and for its hostId.";
    };

    registerWithMachined = mkOption {
      type = types.bool;
      default = false;
      description = "Whether systemd-machined of the host, 256 or later, knows the guest, so that machinectl lists and stops it.";
    };

    vsock = {
      cid = mkOption {
        type = types.nullOr types.int;
        default = null;
        description = "The guest's context id, 3 or more; null for one that is free when it starts.";
      };
      ssh.enable = mkEnableOption "sshd in the guest, which its systemd offers at vsock port 22 as well";
    };

    credentialFiles = mkOption {
      type = types.attrsOf types.path;
      default = { };
      example = literalExpression ''{ age-key = "/run/secrets/guest-age-key"; }'';
      description = "Files of the host that systemd in the guest has as credentials of these names.";
    };

    storeOnDisk = mkOption {
      type = types.bool;
      default = !lib.any ({ source, ... }: source == "/nix/store") cfg.shares;
      defaultText = literalExpression "whether no share has the source /nix/store";
      description = "Whether the guest's store is an image that is built with it.";
    };

    storeDiskType = mkOption {
      type = types.enum [
        "squashfs"
        "erofs"
      ];
      description = "The store image's file system. Default: erofs, or squashfs in a hardened system, which forbids erofs.";
    };

    storeDiskErofsFlags = mkOption {
      type = types.listOf types.str;
      default =
        let
          atLeast = lib.versionAtLeast config.boot.kernelPackages.kernel.version;
        in
        [ "-zlz4hc" ]
        ++ lib.optional (atLeast "5.16") "-Eztailpacking"
        ++ lib.optional (atLeast "6.1") "-Efragments";
      defaultText = literalExpression ''[ "-zlz4hc" "-Eztailpacking" "-Efragments" ], as far as the kernel reads them'';
      description = ''
        Flags of mkfs.erofs. `-Ededupe` makes a smaller image on one processor: it takes minutes where the
        default takes seconds.
      '';
    };

    storeDiskSquashfsFlags = mkOption {
      type = types.listOf types.str;
      default = [
        "-c"
        "zstd"
        "-j"
        "$NIX_BUILD_CORES"
      ];
      description = "Flags of gensquashfs.";
    };

    storeDisk = mkOption {
      type = types.path;
      description = "The store image, which is built from the system.";
    };

    bootDisk = mkOption {
      type = types.path;
      default = throw "microvm.bootDisk: nixvmm starts kernels directly, so there is no boot disk";
      defaultText = literalExpression "none";
      description = "A disk to boot from, of which nixvmm has no need.";
    };

    registerClosure = mkEnableOption "the guest's Nix database knowing the paths of its system" // {
      default = cfg.guest.enable;
      defaultText = literalExpression "config.microvm.guest.enable";
    };

    writableStoreOverlay = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/nix/.rw-store";
      description = "A writable folder that is laid over the store, so that the guest can build.";
    };

    systemSymlink = mkOption {
      type = types.bool;
      default = !cfg.storeOnDisk;
      defaultText = literalExpression "!config.microvm.storeOnDisk";
      description = "Whether the runner refers to the guest's system, which keeps all of it on the host.";
    };

    binScripts = mkOption {
      type = types.attrsOf types.lines;
      default = { };
      description = "Shell lines of further programs in the runner's bin; those of `tap-up` can be added to.";
    };

    runner = mkOption {
      type = types.attrsOf types.package;
      description = "The package that runs this guest, by the name of each hypervisor.";
    };

    declaredRunner = mkOption {
      type = types.package;
      default = cfg.runner.${cfg.hypervisor};
      defaultText = literalExpression "config.microvm.runner.\${config.microvm.hypervisor}";
      description = "The package that runs this guest.";
    };
  };
}
