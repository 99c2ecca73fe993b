# The package that runs a guest, with the layout that host modules of nixvmm and microvm.nix expect:
# programs in bin, what they need to know of the guest in share/microvm.
{
  pkgs,
  microvmConfig,
  toplevel,
}:

let
  inherit (pkgs) lib;
  inherit (lib)
    concatMapStrings
    escapeShellArg
    escapeShellArgs
    mapAttrsToList
    optionalAttrs
    optionalString
    ;

  # The adapter hands over options of microvm.nix, which has none of ours.
  cfg = microvmConfig;
  inherit (cfg) hostName;
  host = cfg.vmHostPackages;
  nixvmm = lib.getExe' cfg.nixvmm.package "nixvmm";
  socket = escapeShellArg cfg.socket;

  kernelFile = "${cfg.kernel}/${pkgs.stdenv.hostPlatform.linux-kernel.target or "bzImage"}";

  # Unpacked once, when the guest is built, instead of at each of its starts.
  kernel =
    if cfg.nixvmm.unpackKernel then
      "${
        pkgs.buildPackages.runCommand "vmlinux-${cfg.kernel.version or "unpacked"}" { } ''
          mkdir $out
          ${lib.getExe' cfg.nixvmm.buildPackage "nixvmm"} unpack-kernel ${kernelFile} $out/vmlinux
        ''
      }/vmlinux"
    else
      kernelFile;

  machine = import ./machine.nix { inherit lib; } { inherit microvmConfig kernel; };
  machineFile = host.writeText "microvm-${hostName}-machine.json" (builtins.toJSON machine);

  hasUserNetwork = lib.any ({ type, ... }: type == "user") cfg.interfaces;

  # systemd hands secrets over that only root can read; by hand they are read where they are.
  credential = name: file: ''
    secret=${escapeShellArg (toString file)}
    if [ -e "''${CREDENTIALS_DIRECTORY:-/nonexistent}"/${escapeShellArg name} ]; then
      secret=$CREDENTIALS_DIRECTORY/${name}
    fi
    arguments+=(--credential ${escapeShellArg name}="@$secret")
  '';

  run = ''
    set -euo pipefail
    ${cfg.preStart}
    ${import ./volumes.nix {
      inherit lib;
      pkgs = host;
    } cfg.volumes}
    ${(import ./macvtap.nix { inherit lib; } cfg).open}
    ${optionalString hasUserNetwork "export PATH=${lib.makeBinPath [ host.passt ]}\${PATH:+:$PATH}"}
    arguments=(--config ${machineFile})
    # Values of this instance, for which nothing has to be built: later files win.
    for layer in machine.d/*.json; do
      if [ -e "$layer" ]; then
        arguments+=(--config "$layer")
      fi
    done
    ${lib.concatStrings (mapAttrsToList credential cfg.credentialFiles)}
    arguments+=(${escapeShellArgs cfg.nixvmm.extraArgs})
    ${optionalString (cfg.extraArgsScript != null) ''
      read -r -a words <<< "$(${cfg.extraArgsScript})"
      arguments+=("''${words[@]}")
    ''}
    exec ${optionalString cfg.prettyProcnames "-a ${escapeShellArg "microvm@${hostName}"} "}${nixvmm} run "''${arguments[@]}" "$@"
  '';

  # Power-off is asked for once; the guest's end closes the stream of events. Returning before it
  # would have the service manager end the guest.
  shutdown = ''
    set -euo pipefail
    ${nixvmm} ctl ${socket} power-off
    ${nixvmm} ctl ${socket} events >/dev/null 2>&1 || true
  '';

  balloon = ''
    set -euo pipefail
    if [ $# -ne 1 ]; then
      echo "usage: $0 MEBIBYTES, which the guest puts into its balloon for the host" >&2
      exit 2
    fi
    exec ${nixvmm} ctl ${socket} balloon "$1M"
  '';

  console = ''
    exec ${nixvmm} ctl ${socket} console
  '';

  programs =
    # No share needs a unit, and no device is taken from the host.
    removeAttrs cfg.binScripts [
      "pci-setup"
      "virtiofsd-run"
    ]
    // {
      microvm-run = run;
    }
    // optionalAttrs (cfg.socket != null) {
      microvm-shutdown = shutdown;
      microvm-balloon = balloon;
      microvm-console = console;
    };

  line = file: text: ''
    echo ${escapeShellArg text} >> $out/share/microvm/${file}
  '';

  interface =
    {
      type,
      id,
      mac,
      macvtap ? { },
      ...
    }:
    if type == "tap" || type == "bridge" then
      line "tap-interfaces" id
    else if type == "macvtap" then
      line "macvtap-interfaces" "${id} ${mac} ${macvtap.link} ${macvtap.mode}"
    else
      "";
in
host.buildPackages.runCommand "microvm-nixvmm-${hostName}"
  {
    meta.mainProgram = "microvm-run";
    passthru = {
      canShutdown = cfg.socket != null;
      supportsNotifySocket = true;
      tapMultiQueue = true;
      hypervisor = "nixvmm";
      inherit (cfg) machineId registerWithMachined;
      inherit machine machineFile programs;
    };
  }
  ''
    mkdir -p $out/bin $out/share/microvm
    ${lib.concatStrings (
      mapAttrsToList (name: text: ''
        ln -s ${host.writeShellScript "microvm-${hostName}-${name}" text} $out/bin/${name}
      '') programs
    )}
    ln -s ${machineFile} $out/share/microvm/machine.json
    ${line "hypervisor" "nixvmm"}
    ${line "tap-flags" "vnet_hdr"}
    ${line "tap-flags" "multi_queue"}
    ${concatMapStrings interface cfg.interfaces}
    ${optionalString (cfg.vsock.cid != null) (line "vsock-cid" (toString cfg.vsock.cid))}
    ${optionalString cfg.systemSymlink "ln -s ${toplevel} $out/share/microvm/system"}
  ''
