# Programs that make the guest's interfaces and remove them. Under our host module they run as the
# guest's user with CAP_NET_ADMIN, under that of microvm.nix as root for its user microvm.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    concatMapStrings
    escapeShellArg
    mkIf
    optionalString
    ;

  cfg = config.microvm;
  ofType = types: builtins.filter ({ type, ... }: lib.elem type types) cfg.interfaces;
  taps = ofType [
    "tap"
    "bridge"
  ];
  macvtaps = ofType [ "macvtap" ];

  ip = lib.getExe' pkgs.iproute2 "ip";
  coreutil = lib.getExe' pkgs.coreutils;

  owner = ''
    owner=$(${coreutil "id"} -u)
    if [ "$owner" = 0 ]; then
      owner=microvm
    fi
  '';

  # One that a host which lost power or a killed unit left behind is in nobody's use.
  removeStale = id: ''
    if [ -e /sys/class/net/${id} ]; then
      ${ip} link delete dev ${escapeShellArg id}
    fi
  '';

  tapUp =
    { id, bridge, ... }:
    ''
      ${removeStale id}
      ${ip} tuntap add name ${escapeShellArg id} mode tap user "$owner" vnet_hdr multi_queue
      ${optionalString (
        bridge != null
      ) "${ip} link set dev ${escapeShellArg id} master ${escapeShellArg bridge}"}
      ${ip} link set dev ${escapeShellArg id} up
    '';

  macvtapUp =
    {
      id,
      mac,
      macvtap,
      ...
    }:
    ''
      ${removeStale id}
      ${ip} link add link ${escapeShellArg macvtap.link} name ${escapeShellArg id} address ${escapeShellArg mac} numrxqueues ${queues} numtxqueues ${queues} type macvtap mode ${macvtap.mode}
      ${ip} link set dev ${escapeShellArg id} allmulticast on
      # The address is the guest's: the host shall not speak IPv6 with it.
      ${ip} link set dev ${escapeShellArg id} addrgenmode none
      ${ip} link set dev ${escapeShellArg id} up
      ${coreutil "chown"} "$owner" "/dev/tap$(< /sys/class/net/${id}/ifindex)"
    '';

  queues = toString (lib.min cfg.vcpu 16);

  down =
    { id, ... }:
    ''
      ${ip} link delete dev ${escapeShellArg id} || true
    '';

  # Lines that users add to these scripts come after them.
  lines = text: lib.mkBefore text;
in
{
  microvm.binScripts = mkIf cfg.guest.enable (
    lib.mkMerge [
      (mkIf (taps != [ ]) {
        tap-up = lines ("set -euo pipefail\n" + owner + concatMapStrings tapUp taps);
        tap-down = lines ("set -uo pipefail\n" + concatMapStrings down taps);
      })
      (mkIf (macvtaps != [ ]) {
        macvtap-up = lines ("set -euo pipefail\n" + owner + concatMapStrings macvtapUp macvtaps);
        macvtap-down = lines ("set -uo pipefail\n" + concatMapStrings down macvtaps);
      })
    ]
  );
}
