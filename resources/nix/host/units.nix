# The units of resources/systemd as a package, and what a guest's drop-in says.
{
  lib,
  pkgs,
  stateDir,
}:

let
  inherit (lib) hasPrefix optional unique;

  isDefault = stateDir == "/var/lib/microvms";
in
rec {
  # Units that act for nixvmm@NAME before it starts and after it ends.
  helpers = [
    "nixvmm-booted"
    "nixvmm-tap"
    "nixvmm-macvtap"
  ];

  package = pkgs.runCommandLocal "nixvmm-units" { } ''
    mkdir -p $out/lib/systemd/system
    cp ${../../systemd}/*.service ${../../systemd}/*.target $out/lib/systemd/system
    ${lib.optionalString (!isDefault) ''
      chmod u+w $out/lib/systemd/system/*
      sed -i -e 's|^StateDirectory=microvms/%i|ReadWritePaths=${stateDir}/%i|' \
        -e '/^StateDirectoryMode=/d' -e 's|/var/lib/microvms|${stateDir}|' $out/lib/systemd/system/*.service
    ''}
  '';

  # What the guest uses outside its folder, which its unit would hide or keep from being written.
  paths =
    guest:
    let
      isAbsolute = hasPrefix "/";
      images = map (volume: volume // { path = volume.image; }) guest.volumes;
      files = builtins.filter ({ path, ... }: isAbsolute path) images;
      devices = builtins.filter ({ path, ... }: hasPrefix "/dev/" path) files;
      folders = map ({ path, readOnly, ... }: {
        inherit readOnly;
        path = dirOf path;
      }) (builtins.filter ({ path, ... }: !hasPrefix "/dev/" path) files);
      shares = map ({ source, readOnly, ... }: {
        inherit readOnly;
        path = source;
      }) (builtins.filter ({ source, ... }: isAbsolute source) guest.shares);
      used = folders ++ shares;
      isHome =
        { path, ... }:
        lib.any (home: hasPrefix home path) [
          "/home"
          "/root"
          "/run/user"
        ];
      hasChildren = guest.shares != [ ] || lib.any ({ type, ... }: type == "user") guest.interfaces;
      secrets = lib.mapAttrsToList (name: file: "${name}:${toString file}") guest.credentialFiles;
      setting = name: values: lib.optionalAttrs (values != [ ]) { ${name} = unique values; };
    in
    setting "ReadWritePaths" (
      map ({ path, ... }: "-${path}") (builtins.filter ({ readOnly, ... }: !readOnly) used)
    )
    // setting "DeviceAllow" (
      map ({ path, readOnly, ... }: "${path} ${if readOnly then "r" else "rw"}") devices
    )
    // setting "SupplementaryGroups" (optional (devices != [ ]) "disk")
    // setting "LoadCredential" secrets
    // lib.optionalAttrs (lib.any isHome used) { ProtectHome = false; }
    # As resources/systemd/child-processes.conf says.
    // lib.optionalAttrs hasChildren {
      ProcSubset = "all";
      RestrictNamespaces = false;
      SystemCallFilter = [ "@mount chroot" ];
    };

  # A runner of microvm.nix knows nothing of our confinement, and has processes of its own.
  foreign = runner: {
    requires = [
      "nixvmm-virtiofsd@%i.service"
      "nixvmm-pci@%i.service"
    ];
    after = [
      "nixvmm-virtiofsd@%i.service"
      "nixvmm-pci@%i.service"
    ];
    serviceConfig = open // {
      Type = if runner.supportsNotifySocket or false then "notify" else "simple";
      NotifyAccess = "all";
      Restart = "always";
      RestartSec = "5s";
    };
  };

  # It registers itself by scripts for root.
  registering.serviceConfig = {
    ExecStartPost = "+${stateDir}/%i/booted/bin/microvm-register $MAINPID";
    ExecStopPost = "+${stateDir}/%i/booted/bin/microvm-unregister";
  };

  open = {
    DevicePolicy = "auto";
    MemoryDenyWriteExecute = false;
    PrivateTmp = false;
    ProcSubset = "all";
    ProtectHome = false;
    ProtectKernelTunables = false;
    ProtectSystem = false;
    RestrictAddressFamilies = "";
    RestrictNamespaces = false;
    SystemCallFilter = "";
  };

  # Interfaces of such a runner are made by root for the user microvm.
  asRoot = open // {
    User = "root";
    StateDirectory = "";
    CapabilityBoundingSet = "~";
    IPAddressDeny = "";
  };

  foreignHelpers =
    let
      helper =
        {
          description,
          program,
          extra,
        }:
        {
          inherit description;
          partOf = [ "nixvmm@%i.service" ];
          before = [ "nixvmm@%i.service" ];
          after = [ "nixvmm-booted@%i.service" ];
          requires = [ "nixvmm-booted@%i.service" ];
          unitConfig.ConditionPathExists = "${stateDir}/%i/current/bin/${program}";
          restartIfChanged = false;
          serviceConfig = {
            WorkingDirectory = "${stateDir}/%i";
            ExecStart = "${stateDir}/%i/booted/bin/${program}";
          }
          // extra;
        };
    in
    {
      "nixvmm-virtiofsd@" = helper {
        description = "File server of the guest %i";
        program = "virtiofsd-run";
        extra = {
          Type = "notify";
          NotifyAccess = "all";
          LimitNOFILE = 1048576;
          PrivateTmp = true;
          KillMode = "mixed";
          TimeoutStopSec = 10;
        };
      };
      "nixvmm-pci@" = helper {
        description = "Devices passed through to the guest %i";
        program = "pci-setup";
        extra = {
          Type = "oneshot";
          RemainAfterExit = true;
        };
      };
    };
}
