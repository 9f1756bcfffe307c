//! Administrative commands: what a write to CMD starts, and how it ends.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::DsaProfile;
use super::device::{Device, Snapshot};
use super::queue::Settings;
use super::registers::{Control, configuration_is_valid, read_buffers_fit};
use super::spec::{Cmd, CmdSts, Command, CommandError, DeviceState, IntCause, WqState};

/// In the operand of the interrupt handle commands: of the message storage, which this device has not.
const HANDLE_IMS: u32 = 1 << 16;

/// A command that waits until descriptors are done.
pub(super) struct Pending {
    command: Command,
    /// Bit n: work queue n.
    queues: u32,
    /// How many descriptors of each queue there were when the command came.
    accepted: Vec<u64>,
    /// What the engines were doing when the last of these had been taken.
    engines: Vec<Snapshot>,
    interrupt: bool,
}

/// CMDCAP.
pub(super) fn supported(profile: &DsaProfile) -> u32 {
    let handles = [Command::RequestInterruptHandle, Command::ReleaseInterruptHandle];
    Command::ALL
        .iter()
        .filter(|command| profile.interrupt_handles || !handles.contains(command))
        .fold(0, |bits, command| bits | 1 << *command as u8)
}

/// What a command comes to at once.
enum Begun {
    /// It is done, with this result.
    Done(u16),
    /// It waits for these queues.
    Waits(u32),
}

/// Starts a command. None is active.
pub(super) fn begin(device: &Device, control: &mut Control, cmd: Cmd) {
    control.status = CmdSts::new();
    let known = Command::from_code(cmd.code()).filter(|_| supported(&device.profile) & 1 << cmd.code() != 0);
    let begun = match known {
        None => Err(CommandError::BAD_COMMAND),
        Some(command) => start(device, control, command, cmd.operand()).map(|begun| (command, begun)),
    };
    match begun {
        Err(error) => finish(device, control, CmdSts::new().with_error(error.0), cmd.request_interrupt()),
        Ok((_, Begun::Done(result))) => {
            finish(device, control, CmdSts::new().with_result(result), cmd.request_interrupt());
        }
        Ok((command, Begun::Waits(queues))) => {
            control.status.set_active(true);
            control.pending = Some(Pending {
                command,
                queues,
                accepted: device.queues.iter().map(|queue| queue.entries().accepted()).collect(),
                engines: Vec::new(),
                interrupt: cmd.request_interrupt(),
            });
            device.command_active.store(true, Ordering::Release);
            progress(device, control);
        }
    }
}

/// Ends the active command, if what it waits for has come.
pub(super) fn progress(device: &Device, control: &mut Control) {
    let Some(mut pending) = control.pending.take() else { return };
    if !pending.is_over(device) {
        control.pending = Some(pending);
        return;
    }
    device.end_abort();
    let of_operand = |wq: &usize| pending.queues & 1 << wq != 0;
    match pending.command {
        Command::DisableDevice => {
            control.wqs.iter_mut().for_each(|wq| wq.state = WqState::Disabled);
            device.set_state(DeviceState::Disabled);
        }
        Command::ResetDevice => control.reset_configuration(device),
        Command::DisableWq => {
            (0..control.wqs.len())
                .filter(of_operand)
                .for_each(|wq| control.wqs[wq].state = WqState::Disabled);
        }
        Command::ResetWq => {
            (0..control.wqs.len()).filter(of_operand).for_each(|wq| control.reset_wq(device, wq));
        }
        _ => {}
    }
    device.command_active.store(false, Ordering::Release);
    finish(device, control, CmdSts::new(), pending.interrupt);
}

fn finish(device: &Device, control: &mut Control, status: CmdSts, interrupt: bool) {
    control.status = status;
    if interrupt {
        device.cause(IntCause::new().with_command(true), true);
    }
}

impl Pending {
    /// Whether every descriptor that was there is done: first all of them are taken, and then each engine that
    /// worked at that time has gone on.
    fn is_over(&mut self, device: &Device) -> bool {
        if self.engines.is_empty() {
            let taken = |(wq, queue): (usize, &super::queue::WorkQueue)| {
                self.queues & 1 << wq == 0 || queue.entries().taken() >= self.accepted[wq]
            };
            if !device.queues.iter().enumerate().all(taken) {
                return false;
            }
            self.engines = device.activity.iter().map(|engine| engine.snapshot()).collect();
        }
        device.activity.iter().zip(&self.engines).all(|(engine, then)| engine.is_past(*then))
    }
}

fn start(
    device: &Device,
    control: &mut Control,
    command: Command,
    operand: u32,
) -> Result<Begun, CommandError> {
    let all = u32::MAX >> (32 - device.queues.len());
    let enabled = device.state() == DeviceState::Enabled;
    let when_enabled = |begun| if enabled { Ok(begun) } else { Err(CommandError::DEVICE_DISABLED) };
    match command {
        Command::EnableDevice => enable_device(device, control).map(|()| Begun::Done(0)),
        Command::EnableWq => enable_wq(device, control, operand as usize).map(|()| Begun::Done(0)),
        Command::DisableDevice => {
            let begun = when_enabled(Begun::Waits(all))?;
            device.set_state(DeviceState::Draining);
            close(device, control, all);
            Ok(begun)
        }
        // Whose PASID a descriptor has is known only once it is taken: this waits for all.
        Command::DrainAll | Command::DrainPasid => when_enabled(Begun::Waits(all)),
        Command::AbortAll => {
            let begun = when_enabled(Begun::Waits(all))?;
            device.begin_abort(all, None);
            Ok(begun)
        }
        Command::ResetDevice => {
            device.begin_abort(all, None);
            close(device, control, all);
            Ok(Begun::Waits(all))
        }
        Command::DisableWq | Command::DrainWq | Command::AbortWq | Command::ResetWq => {
            let queues = enabled_queues(device, control, operand)?;
            if matches!(command, Command::AbortWq | Command::ResetWq) {
                device.begin_abort(queues, None);
            }
            if matches!(command, Command::DisableWq | Command::ResetWq) {
                close(device, control, queues);
            }
            Ok(Begun::Waits(queues))
        }
        Command::AbortPasid => {
            let begun = when_enabled(Begun::Waits(all))?;
            device.begin_abort(0, Some(operand));
            Ok(begun)
        }
        Command::RequestInterruptHandle => request_handle(device, operand).map(Begun::Done),
        Command::ReleaseInterruptHandle => release_handle(device, operand).map(|()| Begun::Done(0)),
    }
}

/// Stops these queues from accepting descriptors.
fn close(device: &Device, control: &mut Control, queues: u32) {
    for (wq, config) in control.wqs.iter_mut().enumerate().filter(|(wq, _)| queues & 1 << wq != 0) {
        device.queues[wq].close();
        if config.state == WqState::Enabled {
            config.state = WqState::Draining;
        }
    }
}

/// The queues of an operand that names a set of sixteen; each must be enabled.
fn enabled_queues(device: &Device, control: &Control, operand: u32) -> Result<u32, CommandError> {
    if device.state() != DeviceState::Enabled {
        return Err(CommandError::DEVICE_DISABLED);
    }
    let first = (operand >> 16) as usize * 16;
    let mut queues = 0;
    for wq in (0..16).filter(|n| operand & 1 << n != 0).map(|n| first + n) {
        let config = control.wqs.get(wq).ok_or(CommandError::BAD_WQ)?;
        if config.state != WqState::Enabled {
            return Err(CommandError::WQ_NOT_ENABLED);
        }
        queues |= 1 << wq;
    }
    if queues == 0 { Err(CommandError::BAD_WQ) } else { Ok(queues) }
}

fn enable_device(device: &Device, control: &Control) -> Result<(), CommandError> {
    let check = |holds: bool, error| if holds { Ok(()) } else { Err(error) };
    check(device.state() == DeviceState::Disabled, CommandError::DEVICE_NOT_DISABLED)?;
    check(configuration_is_valid(control), CommandError::CONFIG)?;
    check(device.functions().bus_master, CommandError::BUS_MASTER_OFF)?;
    let total: u32 = control.wqs.iter().map(|wq| u32::from(wq.size())).sum();
    check(total <= device.profile.wq_entries.into(), CommandError::TOTAL_WQ_SIZE)?;

    let sized =
        control.wqs.iter().enumerate().filter(|(_, wq)| wq.size() > 0).fold(0, |bits, (n, _)| bits | 1 << n);
    let (mut wqs, mut engines) = (0_u64, 0_u64);
    for group in &control.groups {
        check(
            group.wqs[0] >> control.wqs.len() == 0
                && group.wqs[1..].iter().all(|more| *more == 0)
                && group.engines >> device.profile.engines == 0,
            CommandError::GROUP_OUT_OF_RANGE,
        )?;
        check(wqs & group.wqs[0] == 0 && engines & group.engines == 0, CommandError::GROUP_MEMBER_TWICE)?;
        check(group.wqs[0] & sized == 0 || group.engines != 0, CommandError::GROUP_INCOMPLETE)?;
        (wqs, engines) = (wqs | group.wqs[0], engines | group.engines);
    }
    check(sized & !wqs == 0, CommandError::GROUP_MEMBER_TWICE)?;
    check(read_buffers_fit(control), CommandError::GROUP_READ_BUFFERS)?;

    for (n, core) in device.cores().iter().enumerate() {
        let group = control.groups.iter().find(|group| group.engines & 1 << n != 0);
        let queues = group.map_or(0, |group| group.wqs[0] as u32);
        core.lock().unwrap_or_else(PoisonError::into_inner).serve(queues);
    }
    device.set_state(DeviceState::Enabled);
    Ok(())
}

fn enable_wq(device: &Device, control: &mut Control, wq: usize) -> Result<(), CommandError> {
    let check = |holds: bool, error| if holds { Ok(()) } else { Err(error) };
    let profile = &device.profile;
    check(device.state() == DeviceState::Enabled, CommandError::DEVICE_NOT_ENABLED)?;
    let config = control.wqs.get_mut(wq).ok_or(CommandError::BAD_WQ)?;
    let (mode, limits) = (config.mode(), config.limits());
    let shared = !mode.dedicated();
    check(config.state == WqState::Disabled, CommandError::WQ_NOT_DISABLED)?;
    check(config.size() != 0, CommandError::WQ_SIZE)?;
    check(!shared || (1..=config.size()).contains(&config.threshold()), CommandError::WQ_SIZE)?;
    check(mode.priority() != 0, CommandError::WQ_PRIORITY)?;
    check(if shared { profile.shared } else { profile.dedicated }, CommandError::WQ_MODE)?;
    check(!mode.block_on_fault(), CommandError::WQ_BLOCK_ON_FAULT)?;
    let functions = device.functions();
    check(mode.pasid_enable() || !shared, CommandError::WQ_PASID)?;
    check(functions.pasid || !mode.pasid_enable(), CommandError::WQ_PASID)?;
    check(functions.privileged || !mode.privileged(), CommandError::WQ_PASID)?;
    check(limits.max_batch_shift() <= profile.max_batch_shift, CommandError::WQ_MAX_BATCH)?;
    check(limits.max_transfer_shift() <= profile.max_transfer_shift, CommandError::WQ_MAX_TRANSFER)?;

    let settings = Settings::new()
        .with_pasid(mode.pasid())
        .with_pasid_enable(mode.pasid_enable())
        .with_privileged(mode.privileged())
        .with_dedicated(mode.dedicated())
        .with_max_transfer_shift(limits.max_transfer_shift())
        .with_max_batch_shift(limits.max_batch_shift())
        .with_priority(mode.priority().into());
    config.state = WqState::Enabled;
    device.queues[wq].open(settings, config.size(), config.threshold(), config.op_config[0]);
    Ok(())
}

fn request_handle(device: &Device, operand: u32) -> Result<u16, CommandError> {
    let index = operand & 0xffff;
    if operand & HANDLE_IMS != 0 || index as usize >= device.msix_perm.len() {
        return Err(CommandError::BAD_INTERRUPT_INDEX);
    }
    let before = device.handles.fetch_or(1 << index, Ordering::Relaxed);
    if before & 1 << index != 0 { Err(CommandError::NO_HANDLE) } else { Ok(index as u16) }
}

fn release_handle(device: &Device, operand: u32) -> Result<(), CommandError> {
    let handle = operand & 0xffff;
    if operand & HANDLE_IMS != 0 || handle as usize >= device.msix_perm.len() {
        return Err(CommandError::BAD_INTERRUPT_INDEX);
    }
    let before = device.handles.fetch_and(!(1 << handle), Ordering::Relaxed);
    if before & 1 << handle == 0 { Err(CommandError::BAD_INTERRUPT_INDEX) } else { Ok(()) }
}
