# Names, types and defaults that a configuration for microvm.nix counts on.
{
  lib,
  guest,
  host,
  throws,
  ...
}:

let
  plain = (guest { }).microvm;
  onHost = (host { }).microvm;

  defaults = {
    vcpu = 1;
    mem = 512;
    hugepageMem = false;
    hotplugMem = 0;
    hotpluggedMem = 0;
    balloon = false;
    initialBalloonMem = 0;
    deflateOnOOM = true;
    preStart = "";
    extraArgsScript = null;
    socket = "guest.sock";
    user = null;
    cpu = null;
    prettyProcnames = true;
    registerWithMachined = false;
    credentialFiles = { };
    forwardPorts = [ ];
    volumes = [ ];
    interfaces = [ ];
    shares = [ ];
    devices = [ ];
    storeOnDisk = true;
    storeDiskType = "erofs";
    registerClosure = true;
    writableStoreOverlay = null;
    systemSymlink = false;
    hypervisor = "nixvmm";
    machineId = "40a76ac3-bc29-bd43-81d6-3b4df3fbd0a3";
  };
in
{
  cases = {
    "options: defaults are those of microvm.nix" = {
      found = builtins.intersectAttrs defaults plain;
      expected = defaults // {
        inherit (plain) machineId;
      };
    };
    "options: the identity is the hash that microvm.nix makes of the name" = {
      found = lib.replaceStrings [ "-" ] [ "" ] plain.machineId;
      expected = builtins.substring 0 32 (builtins.hashString "sha256" "microvm.nix:guest");
    };
    "options: dedupe is off and the flags suit the kernel" = {
      found = plain.storeDiskErofsFlags;
      expected = [
        "-zlz4hc"
        "-Eztailpacking"
        "-Efragments"
      ];
    };
    "options: every hypervisor of microvm.nix is accepted, and no other" = {
      found = map (hypervisor: throws (guest { microvm = { inherit hypervisor; }; }).microvm.hypervisor) [
        "qemu"
        "cloud-hypervisor"
        "vfkit"
        "bochs"
      ];
      expected = [
        false
        false
        false
        true
      ];
    };
    "options: the guest can be switched off" = {
      found = (guest { microvm.guest.enable = false; }).fileSystems;
      expected = { };
    };
    "options: the host has its defaults" = {
      found = {
        inherit (onHost) stateDir autostart vms;
        inherit (onHost.host)
          enable
          startupTimeout
          useNotifySockets
          stopOrphans
          ;
      };
      expected = {
        stateDir = "/var/lib/microvms";
        autostart = [ ];
        vms = { };
        enable = true;
        startupTimeout = 150;
        useNotifySockets = false;
        stopOrphans = true;
      };
    };
  };
}
