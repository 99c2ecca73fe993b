# Which descriptors of nixvmm are the macvtap interfaces: one for each queue pair, from 3 on.
{ lib }:

microvmConfig:

let
  interfaces = builtins.filter ({ type, ... }: type == "macvtap") microvmConfig.interfaces;
  pairs = lib.min microvmConfig.vcpu 16;
in
rec {
  descriptors = lib.listToAttrs (
    lib.imap0 (
      index: { id, ... }: lib.nameValuePair id (lib.genList (pair: 3 + index * pairs + pair) pairs)
    ) interfaces
  );

  # Shell lines that open them.
  open = lib.concatMapStrings (
    { id, ... }:
    lib.concatMapStrings (descriptor: ''
      exec ${toString descriptor}<>"/dev/tap$(< /sys/class/net/${id}/ifindex)"
    '') descriptors.${id}
  ) interfaces;
}
