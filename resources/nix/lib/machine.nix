# From the options of a guest to the machine that `nixvmm run --config` takes. What cannot be had is
# refused here, at evaluation.
{ lib }:

{ microvmConfig, kernel }:

let
  inherit (lib)
    concatStringsSep
    filterAttrs
    imap0
    optional
    optionalAttrs
    ;

  cfg = microvmConfig;
  inherit (cfg) hostName;
  volumeSerial = import ./volume-serial.nix;
  mebibytes = number: "${toString number}M";

  # Memory comes in blocks of so many MiB (that of the guest's kernel).
  block = 128;
  growth = cfg.hotplugMem - cfg.hotpluggedMem;
  blocks = (growth + block - 1) / block;
  base = cfg.mem + cfg.hotpluggedMem;

  memory = {
    size = mebibytes base;
  }
  // optionalAttrs (growth > 0) { max = mebibytes (base + blocks * block); }
  // optionalAttrs cfg.hugepageMem { hugepages = "2M"; }
  // optionalAttrs isPrivate { mergeable = true; };

  # No other process has it, so that the host can merge its pages.
  isPrivate =
    !cfg.hugepageMem && cfg.shares == [ ] && lib.all ({ type, ... }: type != "user") cfg.interfaces;

  storeDisk = {
    path = toString cfg.storeDisk;
    readonly = true;
    serial = cfg.nixvmm.storeDiskSerial;
  };

  volume =
    index: volume:
    if (volume.imageType or "raw") != "raw" then
      throw "MicroVM ${hostName}: volume ${volume.image} has imageType \"${volume.imageType}\", and nixvmm reads raw images only: convert it with `qemu-img convert -O raw`"
    else
      {
        path = volume.image;
        readonly = volume.readOnly or false;
        direct = volume.direct or false;
        serial = volumeSerial index volume;
      };

  interface =
    index: interface:
    {
      tap = {
        tap = interface.id;
        vhost = if interface.tap.vhost or false then "on" else "auto";
      };
      # A tap as well, which tap-up adds to the bridge.
      bridge.tap = interface.id;
      macvtap = {
        type = "macvtap";
        fd = (import ./macvtap.nix { inherit lib; } cfg).descriptors.${interface.id};
      };
      user = {
        type = "user";
      }
      // optionalAttrs (index == firstUserInterface && forwards != [ ]) { inherit forwards; };
    }
    .${interface.type}
    // {
      inherit (interface) mac;
    };

  firstUserInterface = lib.lists.findFirstIndex (
    interface: interface.type == "user"
  ) null cfg.interfaces;

  # passt leads what the guest sends to its gateway to the host, so `from = "guest"` needs no rule.
  forwards = map (
    {
      proto,
      host,
      guest,
      ...
    }:
    concatStringsSep ":" (
      [ proto ]
      ++ optional (host.address != "") (address host.address)
      ++ [
        (toString host.port)
        (toString guest.port)
      ]
    )
  ) (builtins.filter ({ from, ... }: from == "host") cfg.forwardPorts);

  address = text: if lib.hasInfix ":" text then "[${text}]" else text;

  vsock =
    {
      off = null;
      socket = {
        socket = "notify.vsock";
      }
      // optionalAttrs (cfg.vsock.cid != null) { inherit (cfg.vsock) cid; };
      kernel = optionalAttrs (cfg.vsock.cid != null) { inherit (cfg.vsock) cid; };
    }
    .${cfg.nixvmm.vsock};

  isStore = { source, ... }: source == "/nix/store";
  servesStore = cfg.nixvmm.store != "virtiofsd" && lib.any isStore cfg.shares;
  shares = if servesStore then builtins.filter (share: !isStore share) cfg.shares else cfg.shares;
  storeShare = {
    inherit (lib.findFirst isStore { } cfg.shares) tag;
  }
  // optionalAttrs (cfg.nixvmm.store == "closure") { closure = cfg.nixvmm.storeClosure; };

  # nixvmm starts a virtiofsd for each, whatever protocol the option says.
  share =
    {
      tag,
      source,
      readOnly,
      cache,
      posixAcl,
      extraArgs,
      ...
    }:
    {
      inherit tag source cache;
      readonly = readOnly;
      posix-acl = posixAcl;
      xattr = posixAcl;
      program = lib.getExe' cfg.virtiofsd.package "virtiofsd";
      arguments =
        lib.optional (
          cfg.virtiofsd.inodeFileHandles != null
        ) "--inode-file-handles=${cfg.virtiofsd.inodeFileHandles}"
        ++ cfg.virtiofsd.extraArgs
        ++ extraArgs;
    };

  machine = {
    inherit kernel memory;
    initrd = cfg.initrdPath;
    cmdline = concatStringsSep " " (cfg.kernelParams ++ [ "panic=-1" ]);
    cpus = cfg.vcpu;
    disks = optional cfg.storeOnDisk storeDisk ++ imap0 volume cfg.volumes;
    nets = imap0 interface cfg.interfaces;
    inherit vsock;
    console.kind = "stdio";
    control = cfg.socket;
    balloon.deflate-on-oom = cfg.deflateOnOOM;
    smbios = {
      uuid = cfg.machineId;
      oem-strings = cfg.cloud-hypervisor.platformOEMStrings;
    };
    ready = if vsock == null then "started" else cfg.nixvmm.ready;
    watchdog = cfg.nixvmm.watchdog;
    on-reboot = cfg.nixvmm.onReboot;
  }
  // optionalAttrs cfg.registerWithMachined { machined.name = hostName; }
  // optionalAttrs (shares != [ ]) { shares = map share shares; }
  // optionalAttrs servesStore { store-share = storeShare; };
in
lib.recursiveUpdate (filterAttrs (_: value: value != null) machine) cfg.nixvmm.extraConfig
