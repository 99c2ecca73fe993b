# Volumes, interfaces, ports, shares and devices: names, types and defaults as in microvm.nix.
{ config, lib, ... }:

let
  inherit (lib) mkOption types;
  inherit (types) submodule;

  hostName = config.networking.hostName or "$HOSTNAME";

  option =
    type: default: description:
    mkOption { inherit type default description; };

  # An option without a default.
  needed = type: description: mkOption { inherit type description; };

  list =
    module: description:
    mkOption {
      type = types.listOf (submodule module);
      default = [ ];
      inherit description;
    };

  inherit (types)
    bool
    enum
    int
    listOf
    nullOr
    path
    port
    str
    ;
in
{
  options.microvm = {
    volumes = list {
      options = {
        image = needed str "The image or block device on the host; a relative path begins at the guest's folder.";
        serial =
          option (nullOr str) null
            "The disk's serial: /dev/disk/by-id/virtio-SERIAL in the guest. Null: volume-0 and so on.";
        direct = option bool false "Whether the host's page cache is left out.";
        readOnly = option bool false "Whether the guest may only read.";
        label =
          option (nullOr str) null
            "The file system's label, given when the volume is made; the guest finds it by that.";
        mountPoint = needed (nullOr path) "Where the guest mounts it; null for nowhere.";
        size = needed int "Its size in MiB. A larger one than before lets the image grow; it never shrinks.";
        autoCreate = option bool true "Whether the image and its file system are made when there is none.";
        mkfsExtraArgs = option (listOf str) [ ] "Further arguments of mkfs.";
        fsType = option str "ext4" "The file system.";
        imageType = option (enum [
          "raw"
          "qcow2"
          "vhd"
          "vhdx"
        ]) "raw" "The image's format; nixvmm reads raw ones.";
      };
    } "Disks.";

    interfaces = list {
      options = {
        type =
          needed
            (enum [
              "user"
              "tap"
              "macvtap"
              "bridge"
            ])
            "What is behind the card: a network without root (passt), a tap, a macvtap, or a tap in a bridge.";
        id = needed str "The interface's name on the host, at most 15 characters.";
        mac = needed str "The card's address.";
        bridge = option (nullOr str) null "The bridge that an interface of type `bridge` is added to.";
        macvtap.link = needed str "The host's interface below the macvtap.";
        macvtap.mode = needed (enum [
          "private"
          "vepa"
          "bridge"
          "passthru"
          "source"
        ]) "The macvtap's mode.";
        tap.vhost =
          option bool false
            "Whether the host's kernel must move the frames. It does anyway where it can.";
      };
    } "Network cards.";

    forwardPorts = list {
      options = {
        from =
          option
            (enum [
              "host"
              "guest"
            ])
            "host"
            "From where to where. Guests of nixvmm reach all ports of the host at their gateway's address.";
        proto = option (enum [
          "tcp"
          "udp"
        ]) "tcp" "The protocol.";
        host.address = option str "" "The host's address; empty for all.";
        host.port = needed port "The host's port.";
        guest.address = option str "" "The guest's address.";
        guest.port = needed port "The guest's port.";
      };
    } "Ports between the host and a guest with an interface of type `user`.";

    shares = mkOption {
      default = [ ];
      description = "Folders of the host. nixvmm serves them itself by virtiofs, whatever `proto` says.";
      type = types.listOf (
        submodule (
          { config, ... }:
          {
            options = {
              tag = needed str "The name by which the guest mounts it.";
              socket = option (nullOr str) (
                if config.proto == "virtiofs" then "${hostName}-virtiofs-${config.tag}.sock" else null
              ) "The socket of a virtiofs daemon, of which nixvmm has no need.";
              source = needed types.nonEmptyStr "The folder on the host; a relative path begins at the guest's folder.";
              securityModel = option (enum [
                "passthrough"
                "none"
                "mapped"
                "mapped-file"
              ]) "none" "How qemu keeps owners of a 9p share.";
              mountPoint = needed path "Where the guest mounts it.";
              proto = option (enum [
                "9p"
                "virtiofs"
              ]) "9p" "The protocol that this configuration was written for.";
              readOnly = option bool false "Whether the guest may only read.";
              cache = option (enum [
                "auto"
                "always"
                "metadata"
                "never"
              ]) "auto" "How long the guest may trust what it has read.";
              posixAcl = option bool true "Whether access control lists pass through.";
              extraArgs = option (listOf str) [ ] "Further arguments of a virtiofs daemon.";
            };
          }
        )
      );
    };

    devices = list {
      options = {
        bus = needed (enum [
          "pci"
          "usb"
        ]) "The device's bus.";
        path = needed str "The device on its bus.";
        qemu.id = option (nullOr str) null "What qemu calls it.";
        qemu.bus = option (nullOr str) null "Where qemu puts it.";
        qemu.deviceExtraArgs = option (nullOr str) null "Further properties for qemu.";
      };
    } "Devices of the host that are given to the guest.";
  };
}
