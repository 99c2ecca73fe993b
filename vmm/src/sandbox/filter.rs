//! Filters of system calls, compiled from the tables.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use anyhow::{Context as _, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::ThreadKind;
use super::system_calls::{When, allowed};

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
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        ARCH.try_into().context("no system call filters for this processor")?,
    )
    .context("system call filter")?;
    filter.try_into().context("system call filter")
}

fn rule(when: When) -> Result<SeccompRule, seccompiler::BackendError> {
    let (argument, operator, value) = match when {
        When::Request(request) => (1, SeccompCmpOp::Eq, request.into()),
        When::Command(command) => (1, SeccompCmpOp::Eq, u64::from(command.cast_unsigned())),
        When::NotExecutable => (2, SeccompCmpOp::MaskedEq(EXECUTABLE), 0),
        When::OwnProcess => (0, SeccompCmpOp::Eq, std::process::id().into()),
    };
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;
