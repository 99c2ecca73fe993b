//! Filters of system calls, compiled from the tables.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use anyhow::{Context as _, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};

use super::ThreadKind;
use super::system_calls::{When, allowed};

/// How many calls are compared one after the other. The kernel runs a new filter for every call
/// that exists, to know those that are always allowed; one long comparison makes that slow.
const CALLS_IN_A_ROW: usize = 6;

/// Compiles the filter of a kind of thread. What the tables lack raises SIGSYS.
pub(super) fn compile(kind: ThreadKind) -> Result<BpfProgram> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    // An own table comes first, so that KVM_RUN is the first request that is compared.
    for call in allowed(kind).into_iter().flatten() {
        let conditions = rules.entry(call.number).or_default();
        for when in call.when {
            conditions.push(rule(*when).context("system call table")?);
        }
    }
    let mut programs = Vec::new();
    while let Some((&first, _)) = rules.first_key_value() {
        let next = rules.keys().nth(CALLS_IN_A_ROW).copied();
        let rest = next.map(|next| rules.split_off(&next)).unwrap_or_default();
        programs.push((first, compile_row(std::mem::replace(&mut rules, rest))?));
    }
    join(programs)
}

fn compile_row(rules: BTreeMap<i64, Vec<SeccompRule>>) -> Result<BpfProgram> {
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        ARCH.try_into().context("no system call filters for this processor")?,
    )
    .context("system call filter")?;
    filter.try_into().context("system call filter")
}

/// One program of several, each for the calls from its number to that of the next one. Each ends by
/// itself, and checks the architecture before it compares anything.
fn join(programs: Vec<(i64, BpfProgram)>) -> Result<BpfProgram> {
    let mut joined = vec![instruction(LOAD, 0, NUMBER_OFFSET)];
    let mut firsts = programs.iter().map(|(first, _)| *first).skip(1).collect::<Vec<_>>();
    firsts.push(i64::from(u32::MAX));
    // Behind the choice, which takes two instructions for each program.
    let mut start = 2 * programs.len();
    for (place, (next, (_, program))) in firsts.iter().zip(&programs).enumerate() {
        joined.push(instruction(JUMP_IF_NOT_BELOW, 1, u32::try_from(*next)?));
        let choice_left = 2 * place + 2;
        joined.push(instruction(JUMP, 0, u32::try_from(start - choice_left)?));
        start += program.len();
    }
    joined.extend(programs.into_iter().flat_map(|(_, program)| program));
    Ok(joined)
}

/// Classic BPF (linux/bpf_common.h): the load of a word, jumps, and where seccomp_data has the
/// number of the call.
const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const JUMP_IF_NOT_BELOW: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const NUMBER_OFFSET: u32 = 0;

fn instruction(code: u32, skipped: u8, value: u32) -> sock_filter {
    // All codes fit in a byte.
    let code = u16::try_from(code).unwrap_or_default();
    sock_filter { code, jt: skipped, jf: 0, k: value }
}

fn rule(when: When) -> Result<SeccompRule, seccompiler::BackendError> {
    let (argument, operator, value) = match when {
        When::Request(request) => (1, SeccompCmpOp::Eq, request.into()),
        When::Command(command) => (1, SeccompCmpOp::Eq, u64::from(command.cast_unsigned())),
        When::NotExecutable => (2, SeccompCmpOp::MaskedEq(EXECUTABLE), 0),
        When::UnixSocket => (0, SeccompCmpOp::Eq, libc::AF_UNIX as u64),
        When::OwnProcess => (0, SeccompCmpOp::Eq, std::process::id().into()),
    };
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;
