# What the modules make of configurations, compared with what is expected of them:
#
#     nix-instantiate --eval --strict --json resources/nix/tests --arg lib 'import <nixpkgs/lib>'
#
# `failures` is empty where all is as expected; `machines` are files for `nixvmm check --config`.
{
  lib,
  # Where the kernel, the initrd and so on are, if machines shall be checked.
  store ? "/nix/store",
  # The tree of microvm.nix, to evaluate the adapter and the switch beside it.
  upstream ? null,
}:

let
  pkgs = import ./packages.nix { inherit lib store; };
  evaluate =
    modules: lib.evalModules { modules = [ (import ./nixos.nix { inherit lib pkgs; }) ] ++ modules; };

  tools = rec {
    inherit
      lib
      pkgs
      evaluate
      store
      ;
    guest = modules: (evaluate ([ ../guest ] ++ lib.toList modules)).config;
    host = modules: (evaluate ([ ../host ] ++ lib.toList modules)).config;
    # Messages of assertions that do not hold.
    refusals =
      config:
      map ({ message, ... }: message) (
        builtins.filter ({ assertion, ... }: !assertion) config.assertions
      );
    # Whether something is refused when it is evaluated as a whole.
    throws = value: !(builtins.tryEval (builtins.deepSeq value value)).success;
    machine = config: config.microvm.declaredRunner.machine;
    script = config: name: config.microvm.declaredRunner.programs.${name};
  };

  suites = [
    (import ./options.nix tools)
    (import ./machine.nix tools)
    (import ./guest.nix tools)
    (import ./host.nix tools)
    (import ./flake.nix tools)
  ]
  ++ lib.optional (upstream != null) (import ./adapter.nix (tools // { inherit upstream; }));

  cases = lib.concatMap (suite: lib.mapAttrsToList lib.nameValuePair suite.cases) suites;
in
{
  count = lib.length cases;
  failures = builtins.filter (failure: failure != null) (
    map (
      { name, value }:
      if value.found == value.expected then
        null
      else
        {
          inherit name;
          inherit (value) found expected;
        }
    ) cases
  );
  machines = lib.foldl' (machines: suite: machines // suite.machines or { }) { } suites;
  # Programs of runners, which tests run where their paths lead to something.
  scripts = import ./scripts.nix tools;
}
