//! A real browser on a host of the lab: headless Chromium, driven over its debugging pipe (Chrome
//! DevTools Protocol), so that a page is seen as time passes.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use serde_json::{Value, json};

use crate::netns::Net;

/// For one answer of the browser.
const PATIENCE: Duration = Duration::from_secs(30);

/// A browser with one page.
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    last: u64,
    complaints: VecDeque<String>,
}

impl Browser {
    /// Opens a page in a browser on `host`.
    ///
    /// # Errors
    /// When there is no Chromium, or it does not come up.
    pub fn open(net: &Net, host: &str, url: &str) -> Result<Self> {
        // It takes commands from descriptor 3 and answers on 4. As root it needs to be told that
        // nobody else's pages will be shown.
        let line = format!(
            "exec chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars \
             --user-data-dir={} --remote-debugging-pipe about:blank \
             3<&0 4>&1 </dev/null >/dev/null 2>&1",
            net.dir().join("browser").display()
        );
        let mut child = net
            .command(host, "sh", &["-c", &line])
            .env("HOME", net.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = child.stdin.take().context("stdin is piped")?;
        let answers = child.stdout.take().context("stdout is piped")?;
        let (send, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(answers).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else {
                    break;
                };
                if send.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self {
            child,
            commands,
            messages,
            session: None,
            last: 0,
            complaints: VecDeque::new(),
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        let session = attached["sessionId"].as_str().context("a session")?;
        browser.session = Some(session.to_owned());
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.call("Page.navigate", json!({"url": url}))?;
        Ok(browser)
    }

    /// What an expression is in the page.
    ///
    /// # Errors
    /// When it throws something.
    pub fn eval(&mut self, expression: &str) -> Result<Value> {
        let answer = self.call(
            "Runtime.evaluate",
            json!({"expression": expression, "returnByValue": true}),
        )?;
        ensure!(
            answer.get("exceptionDetails").is_none(),
            "{expression}: {answer}"
        );
        Ok(answer["result"]["value"].clone())
    }

    /// The text of the page, as it is seen.
    ///
    /// # Errors
    /// When the browser is gone.
    pub fn text(&mut self) -> Result<String> {
        // There is no body before the first byte.
        let text = self.eval("document.body ? document.body.innerText : ''")?;
        Ok(text.as_str().context("a text")?.to_owned())
    }

    /// Waits until the page shows all of these.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn expect(&mut self, wanted: &[&str], limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let text = self.text()?;
            let missing = wanted.iter().find(|wanted| !text.contains(**wanted));
            match missing {
                None => return Ok(text),
                Some(missing) if Instant::now() > deadline => bail!("no {missing:?} in: {text}"),
                Some(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Takes another window, and light or dark.
    ///
    /// # Errors
    /// When the browser is gone.
    pub fn emulate(&mut self, width: u32, height: u32, phone: bool, dark: bool) -> Result<()> {
        let metrics = json!({
            "width": width, "height": height, "mobile": phone,
            "deviceScaleFactor": 1,
        });
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}))?;
        Ok(())
    }

    /// Saves the window's content as PNG.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn photograph(&mut self, file: &Path) -> Result<()> {
        let answer = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        let data = answer["data"].as_str().context("a picture")?;
        let png = base64::engine::general_purpose::STANDARD.decode(data)?;
        Ok(std::fs::write(file, png)?)
    }

    /// What was complained about on the console since last asked.
    pub fn complaints(&mut self) -> Vec<String> {
        self.complaints.drain(..).collect()
    }

    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.last += 1;
        let mut command = json!({"id": self.last, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            command["sessionId"] = session.as_str().into();
        }
        let mut bytes = serde_json::to_vec(&command)?;
        bytes.push(0);
        self.commands.write_all(&bytes)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self
                .messages
                .recv_timeout(left)
                .with_context(|| format!("the browser does not answer to {method}"))?;
            self.note(&message);
            if message["id"] == self.last {
                if let Some(error) = message.get("error") {
                    bail!("{method}: {error}");
                }
                return Ok(message["result"].clone());
            }
        }
    }

    fn note(&mut self, message: &Value) {
        let parameters = &message["params"];
        match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push_back(parameters.to_string()),
            Some("Runtime.consoleAPICalled") => self.complaints.push_back(parameters.to_string()),
            Some("Log.entryAdded") => {
                let entry = &parameters["entry"];
                let text = format!("{} {}", entry["text"], entry["url"]);
                self.complaints.push_back(text);
            }
            _ => {}
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A test that failed has more to tell than that this failed, too.
        let _ = self.call("Browser.close", json!({}));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
