# The guest's file systems. Disks are found by serial: their order and labels do not matter.
{ config, lib, ... }:

let
  inherit (lib)
    listToAttrs
    mkDefault
    mkIf
    mkMerge
    nameValuePair
    optionalAttrs
    ;
  inherit (import ../lib { inherit lib; }) volumeSerial;

  cfg = config.microvm;
  overlay = cfg.writableStoreOverlay;
  afterModules = "x-systemd.after=systemd-modules-load.service";

  storeShares = builtins.filter ({ source, ... }: source == "/nix/store") cfg.shares;
  storeShare = lib.head storeShares;
  lowerStore = if cfg.storeOnDisk then "/nix/.ro-store" else storeShare.mountPoint;

  storeDisk = {
    device = "/dev/disk/by-id/virtio-${cfg.nixvmm.storeDiskSerial}";
    fsType = cfg.storeDiskType;
    options = [
      "ro"
      afterModules
    ];
    neededForBoot = true;
    noCheck = true;
  };

  store =
    if overlay != null then
      {
        "/nix/store" = {
          neededForBoot = true;
          overlay = {
            lowerdir = [ lowerStore ];
            upperdir = "${overlay}/store";
            workdir = "${overlay}/work";
          };
          # A share keeps no trusted attributes.
          options = mkIf (lib.any ({ mountPoint, ... }: mountPoint == overlay) cfg.shares) [ "userxattr" ];
        };
      }
      // optionalAttrs cfg.storeOnDisk { ${lowerStore} = storeDisk; }
    else if cfg.storeOnDisk then
      { "/nix/store" = storeDisk; }
    else
      optionalAttrs (storeShare.mountPoint != "/nix/store") {
        "/nix/store" = {
          device = storeShare.mountPoint;
          fsType = "none";
          options = [
            "ro"
            "bind"
          ];
          neededForBoot = true;
        };
      };

  volume =
    index: volume:
    nameValuePair volume.mountPoint (
      {
        inherit (volume) fsType;
        device =
          if volume.label != null then
            "/dev/disk/by-label/${volume.label}"
          else
            "/dev/disk/by-id/virtio-${volumeSerial index volume}";
      }
      // optionalAttrs volume.readOnly { options = [ "ro" ]; }
      // optionalAttrs (volume.mountPoint == overlay || hasDatabase volume) { neededForBoot = true; }
    );

  # Nix learns of the guest's closure before other file systems are mounted.
  hasDatabase = { mountPoint, ... }: lib.hasPrefix "${mountPoint}/" "/nix/var/nix/db/";

  share =
    {
      tag,
      mountPoint,
      source,
      ...
    }:
    nameValuePair mountPoint (
      {
        device = tag;
        fsType = "virtiofs";
        options = [
          "defaults"
          afterModules
        ];
      }
      // optionalAttrs (source == "/nix/store" || mountPoint == overlay) { neededForBoot = true; }
    );

  # A volume keeps its place in the list, from which its serial comes.
  mounted = lib.filter (entry: entry.volume.mountPoint != null) (
    lib.imap0 (index: volume: { inherit index volume; }) cfg.volumes
  );
in
mkIf cfg.guest.enable {
  fileSystems = mkMerge [
    {
      "/" = mkDefault {
        device = "rootfs";
        fsType = "tmpfs";
        options = [ "size=50%,mode=0755" ];
        neededForBoot = true;
      };
    }
    store
    (listToAttrs (map (entry: volume entry.index entry.volume) mounted))
    (listToAttrs (map share cfg.shares))
  ];

  # The store goes last when a guest stops: waiting for it to be unmounted would wait for ever.
  systemd.mounts = mkIf (config.boot.initrd.systemd.enable && !cfg.storeOnDisk && overlay == null) [
    {
      what = "store";
      where = "/nix/store";
      overrideStrategy = "asDropin";
      unitConfig.DefaultDependencies = false;
    }
  ];
}
