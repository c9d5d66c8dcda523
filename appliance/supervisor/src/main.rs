//! `holdfastd`: see [`supervisor`].

use anyhow::Context as _;
use clap::Parser as _;
use std::io::Write as _;
use supervisor::{
    Daemon,
    config::{CommandLine, Config, LogConfig, LogFormat},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("holdfastd: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let line = CommandLine::parse();
    let config = Config::load(&line).map_err(|e| anyhow::anyhow!(e.report()))?;
    log_to_stderr(&config.log);
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("could not start")?;
    let done = runtime.block_on(async {
        let mut term = signal(SignalKind::terminate()).context("could not wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("could not wait for signals")?;
        let daemon = Daemon::start(config).await?;
        let mut ready = format!("READY listen={} control={}", daemon.listen(), daemon.control.display());
        if let Some(at) = daemon.nbd_listen() {
            ready.push_str(&format!(" nbd={at}"));
        }
        if let Some(at) = daemon.web_listen() {
            ready.push_str(&format!(" web={at}"));
        }
        if let Some(at) = daemon.metrics {
            ready.push_str(&format!(" metrics={at}"));
        }
        // Whoever started us may have gone; that is no reason to stop.
        let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        daemon.stop().await;
        Ok(())
    });
    // Everything taken is durable and every thread of ours has ended; what may still run only reads (a verification of hours).
    runtime.shutdown_timeout(LAST_READS);
    done
}

const LAST_READS: std::time::Duration = std::time::Duration::from_secs(2);

fn log_to_stderr(log: &LogConfig) {
    // The level was checked with the configuration.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => builder.with_target(false).with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Each connection, segment and index file takes a descriptor; the usual soft limit of 1024 is there for programs that use select.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read and write the struct handed in, which lives over them.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !done {
        tracing::warn!(error = %std::io::Error::last_os_error(), "could not raise the limit of open files");
    }
}
