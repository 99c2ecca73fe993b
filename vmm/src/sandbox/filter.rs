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
const CALLS_IN_A_ROW: usize = 3;

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

/// One program of several, each for the calls from its number to that of the next one. The choice
/// is a search by halves, and calls of other architectures are refused before it.
fn join(programs: Vec<(i64, BpfProgram)>) -> Result<BpfProgram> {
    let firsts = programs.iter().map(|(first, _)| u32::try_from(*first));
    let firsts = firsts.collect::<Result<Vec<_>, _>>()?;
    let mut starts = Vec::with_capacity(programs.len());
    let mut length = 0;
    for (_, program) in &programs {
        starts.push(length);
        length += program.len();
    }
    // What each program says of other architectures, the first one says for all.
    let choice = choose(&firsts, &starts, 0);
    let mut joined = vec![
        instruction(LOAD, 0, 0, ARCHITECTURE_OFFSET),
        instruction(JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH),
        instruction(JUMP, 0, 0, u32::try_from(choice.len() + 1)?),
        instruction(LOAD, 0, 0, NUMBER_OFFSET),
    ];
    joined.extend(choice);
    joined.extend(programs.into_iter().flat_map(|(_, program)| program));
    Ok(joined)
}

/// Jumps to the program, one of those that start `starts` instructions after the whole choice, that
/// has the number; `behind` instructions of the choice follow these.
fn choose(firsts: &[u32], starts: &[usize], behind: usize) -> Vec<sock_filter> {
    if let [start] = starts {
        return vec![instruction(JUMP, 0, 0, u32::try_from(behind + start).unwrap_or(u32::MAX))];
    }
    let middle = starts.len() / 2;
    let (lower_firsts, upper_firsts) = firsts.split_at(middle);
    let (lower_starts, upper_starts) = starts.split_at(middle);
    let upper = choose(upper_firsts, upper_starts, behind);
    let lower = choose(lower_firsts, lower_starts, behind + upper.len());
    let first = upper_firsts.first().copied().unwrap_or(u32::MAX);
    // A jump by a condition reaches 255 instructions, far more than a choice has.
    let skipped = u8::try_from(lower.len()).unwrap_or(u8::MAX);
    [vec![instruction(JUMP_IF_NOT_BELOW, skipped, 0, first)], lower, upper].concat()
}

/// Classic BPF (linux/bpf_common.h): loads of words and jumps, and where seccomp_data has the
/// number of the call and the architecture.
const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const JUMP_IF_NOT_BELOW: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;

/// This architecture as the kernel names it (linux/audit.h).
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xC000_00B7;

fn instruction(code: u32, jump_true: u8, jump_false: u8, value: u32) -> sock_filter {
    // All codes fit in a byte.
    let code = u16::try_from(code).unwrap_or_default();
    sock_filter { code, jt: jump_true, jf: jump_false, k: value }
}

fn rule(when: When) -> Result<SeccompRule, seccompiler::BackendError> {
    let (argument, operator, value) = match when {
        When::Request(request) => (1, SeccompCmpOp::Eq, request.into()),
        When::Command(command) => (1, SeccompCmpOp::Eq, u64::from(command.cast_unsigned())),
        When::NotExecutable => (2, SeccompCmpOp::MaskedEq(EXECUTABLE), 0),
        When::ThreadName => (0, SeccompCmpOp::Eq, libc::PR_SET_NAME.cast_unsigned().into()),
        When::UnixSocket => (0, SeccompCmpOp::Eq, libc::AF_UNIX as u64),
        When::OwnProcess => (0, SeccompCmpOp::Eq, std::process::id().into()),
    };
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

#[cfg(test)]
mod test {
    use super::*;

    /// What `program` returns for a call, as the kernel would run it.
    fn run(program: &[sock_filter], architecture: u32, number: u32) -> u32 {
        let (mut at, mut word) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |holds| usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                LOAD => word = [number, architecture].get(k as usize / 4).copied().unwrap_or(0),
                JUMP => at += k as usize,
                JUMP_IF_EQUAL => at += jump(word == k),
                JUMP_IF_NOT_BELOW => at += jump(word >= k),
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                // Arguments are zero here, and few conditions hold.
                _ => at += usize::from(jf),
            }
        }
    }

    #[test]
    fn every_call_is_answered_as_the_table_says() {
        for kind in ThreadKind::ALL.into_iter().chain([ThreadKind::StoreServer]) {
            let program = compile(kind).unwrap();
            let always = |number: i64| {
                let mut calls = allowed(kind).into_iter().flatten();
                calls.any(|call| call.number == number && call.when.is_empty())
            };
            let sometimes =
                |number: i64| allowed(kind).into_iter().flatten().any(|call| call.number == number);
            for number in (0..600).chain([0x4000_0000, u32::MAX]) {
                let answer = run(&program, AUDIT_ARCH, number);
                if always(i64::from(number)) {
                    assert_eq!(answer, libc::SECCOMP_RET_ALLOW, "{kind:?} {number}");
                } else if !sometimes(i64::from(number)) {
                    assert_eq!(answer, libc::SECCOMP_RET_TRAP, "{kind:?} {number}");
                }
            }
            let other = run(&program, 0x4000_0003, 0);
            assert_eq!(other, libc::SECCOMP_RET_KILL_PROCESS, "{kind:?}");
        }
    }
}
