# What is said of forwarded ports that nixvmm has no rules for.
forwardPorts:

map (
  { guest, ... }:
  "microvm.forwardPorts: the rule for the guest's way to port ${toString guest.port} is not followed: every port of the host is at the gateway's address"
) (builtins.filter ({ from, ... }: from == "guest") forwardPorts)
