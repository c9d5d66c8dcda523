//! A real browser, driven over its DevTools protocol through a pipe: no port, no web socket, no driver.
//!
//! Whatever the browser complains about – a violation of the content security policy, an error of a script, a file that is missing – is
//! kept, and [`Chrome::quiet`] fails on it.

use serde_json::{Value, json};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(60);

pub struct Chrome {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: String,
    number: u64,
    complaints: Vec<String>,
}

impl Chrome {
    /// `profile` is a folder of its own.
    pub fn start(profile: &Path) -> Self {
        // DevTools speaks on the descriptors 3 and 4.
        let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
                     --disable-component-update --disable-sync --disable-dev-shm-usage --ignore-certificate-errors --lang=en-US \
                     --remote-debugging-pipe";
        let script = format!(
            "exec chromium {flags} --user-data-dir=\"$1\" about:blank 3<&0 4>&1 </dev/null >/dev/null 2>\"$1/log\""
        );
        std::fs::create_dir_all(profile).unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg("chrome").arg(profile).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (to, out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, from) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(out).split(0) {
                let Ok(message) = message else { return };
                let Ok(message) = serde_json::from_slice(&message) else { continue };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut chrome = Self { child, to, from, session: String::new(), number: 0, complaints: Vec::new() };
        let target = chrome.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = chrome.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        chrome.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            chrome.call(&format!("{domain}.enable"), json!({}));
        }
        chrome.size(1280, 900);
        chrome
    }

    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        let message = self.ask(method, parameters);
        assert!(message["error"].is_null(), "{method}: {message}");
        message["result"].clone()
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.number += 1;
        let mut message = json!({ "id": self.number, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser lives");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.from.recv_timeout(left).unwrap_or_else(|_| panic!("no answer to {method}"));
            if message["id"] == self.number {
                return message;
            }
            self.hear(&message);
        }
    }

    fn hear(&mut self, message: &Value) {
        let p = &message["params"];
        match message["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => self.complaints.push(p["exceptionDetails"].to_string()),
            "Runtime.consoleAPICalled" if p["type"] == "error" => self.complaints.push(p["args"].to_string()),
            "Log.entryAdded" if p["entry"]["level"] == "error" => self.complaints.push(p["entry"].to_string()),
            _ => {}
        }
    }

    /// What a script in the page comes to.
    pub fn eval(&mut self, script: &str) -> Value {
        let done = self.call("Runtime.evaluate", json!({ "expression": script, "returnByValue": true }));
        assert!(done["exceptionDetails"].is_null(), "{script}: {done}");
        done["result"]["value"].clone()
    }

    pub fn wait(&mut self, what: &str) {
        let deadline = Instant::now() + DEADLINE;
        let script = format!(
            "(() => {{ try {{ return document.readyState === 'complete' && !!({what}) }} catch (e) {{ return false }} }})()"
        );
        loop {
            // A page that is just being left has no answer.
            let done = self.ask("Runtime.evaluate", json!({ "expression": script, "returnByValue": true }));
            if done["result"]["result"]["value"] == true {
                return;
            }
            if Instant::now() > deadline {
                let text = self.eval("location.href + '\\n' + document.body.innerText");
                panic!("waited too long for {what}; the page is {text}; complaints: {:?}", self.complaints);
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    pub fn go(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
        self.wait("true");
    }

    pub fn fill(&mut self, selector: &str, text: &str) {
        self.wait(&format!("document.querySelector({})", json!(selector)));
        self.eval(&format!("document.querySelector({}).value = {}", json!(selector), json!(text)));
    }

    pub fn click(&mut self, selector: &str) {
        self.wait(&format!("document.querySelector({})", json!(selector)));
        // SVG's links have no click() of their own.
        self.eval(&format!(
            "document.querySelector({}).dispatchEvent(new MouseEvent('click', {{ bubbles: true, cancelable: true, view: window }}))",
            json!(selector)
        ));
    }

    pub fn size(&mut self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }

    pub fn picture(&mut self, file: &Path) {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let png = data_encoding::BASE64.decode(shot["data"].as_str().unwrap().as_bytes()).unwrap();
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, png).unwrap();
    }

    /// The page is no wider than the window, and nothing was complained about.
    pub fn quiet(&mut self, what: &str) {
        let wide = self.eval("document.documentElement.scrollWidth - window.innerWidth");
        assert!(wide.as_i64().unwrap_or(0) <= 0, "{what} is {wide} pixels too wide");
        assert!(self.complaints.is_empty(), "{what}: the browser complains: {:#?}", self.complaints);
    }
}

impl Drop for Chrome {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
