# What no guest can be made of.
{ config, lib, ... }:

let
  inherit (lib) concatLists mapAttrsToList optional;
  inherit (config.networking) hostName;

  cfg = config.microvm;

  refuseUnless = assertion: message: {
    inherit assertion;
    message = "MicroVM ${hostName}: ${message}";
  };

  # Each value of a key may be there once.
  distinct =
    what: key: things:
    mapAttrsToList (
      value: same:
      refuseUnless (
        lib.length same == 1
      ) "${what} \"${value}\" is used ${toString (lib.length same)} times"
    ) (builtins.groupBy (thing: toString thing.${key}) things);

  virtiofs = builtins.filter ({ proto, ... }: proto == "virtiofs") cfg.shares;
  hasUserNetwork = lib.any ({ type, ... }: type == "user") cfg.interfaces;

  interface =
    {
      id,
      type,
      bridge,
      ...
    }:
    [
      (refuseUnless (
        (type == "bridge") == (bridge != null)
      ) "interface ${id}: type \"bridge\" and the option `bridge` need one another")
      (refuseUnless (
        lib.stringLength id <= 15
      ) "interface ${id}: Linux takes names of at most 15 characters")
    ];

  share =
    {
      tag,
      socket,
      posixAcl,
      extraArgs,
      ...
    }:
    let
      translates = lib.any (
        argument: lib.hasInfix "--translate-uid" argument || lib.hasInfix "--translate-gid" argument
      ) (cfg.virtiofsd.extraArgs ++ extraArgs);
    in
    [
      (refuseUnless (socket != null) "share ${tag}: a virtiofs share has a `socket`")
      (refuseUnless (
        !(posixAcl && translates)
      ) "share ${tag}: access control lists name users that are not translated: set posixAcl = false")
    ];

  volume =
    { image, serial, ... }:
    optional (serial != null) (
      refuseUnless (lib.stringLength serial <= 20) "volume ${image}: a serial has at most 20 characters"
    );
in
{
  assertions = lib.optionals cfg.guest.enable (
    distinct "volume image" "image" cfg.volumes
    ++ distinct "interface" "id" cfg.interfaces
    ++ distinct "share tag" "tag" cfg.shares
    ++ distinct "share socket" "socket" virtiofs
    ++ lib.concatMap volume cfg.volumes
    ++ concatLists (map interface cfg.interfaces)
    ++ concatLists (map share virtiofs)
    ++ [
      (refuseUnless (
        cfg.forwardPorts != [ ] -> hasUserNetwork
      ) "forwardPorts needs an interface of type \"user\"")
      (refuseUnless (
        !lib.any (lib.hasInfix "oem_strings") cfg.cloud-hypervisor.platformOEMStrings
      ) "platformOEMStrings holds the strings themselves, without oem_strings")
      (refuseUnless (
        cfg.nixvmm.ready == "reachable" -> config.services.openssh.enable
      ) "nixvmm.ready = \"reachable\" waits for sshd: enable microvm.vsock.ssh or services.openssh")
      (refuseUnless (
        cfg.hotpluggedMem <= cfg.hotplugMem
      ) "hotpluggedMem is a part of hotplugMem, and cannot be more")
      (refuseUnless (
        cfg.vsock.cid == null || cfg.vsock.cid >= 3
      ) "vsock.cid ${toString cfg.vsock.cid}: 0, 1 and 2 are the hypervisor's, nobody's and the host's")
      (refuseUnless (
        cfg.writableStoreOverlay != null
        -> !(config.nix.optimise.automatic || config.nix.settings.auto-optimise-store)
      ) "a writable store overlay and optimising the store exclude one another")
    ]
  );
}
