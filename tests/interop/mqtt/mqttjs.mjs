// One MQTT.js client that does what its input says, a JSON array a line: for the interop run.
// node mqttjs.mjs URL VERSION CLIENT-ID CA CERT KEY
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import mqtt from "mqtt";

const [url, version, clientId, ca, cert, key] = process.argv.slice(2);
const say = (...words) => process.stdout.write(JSON.stringify(words) + "\n");
const client = mqtt.connect(url, {
  protocolVersion: Number(version),
  clientId,
  clean: true,
  reconnectPeriod: 0,
  ...(/^(wss|mqtts):/.test(url)
    ? { ca: readFileSync(ca), cert: readFileSync(cert), key: readFileSync(key) }
    : {}),
});
client.on("error", (error) => say("error", String(error)));
client.on("close", () => process.exit(0));
client.on("message", (topic, payload, packet) =>
  say("message", topic, payload.toString(), packet.qos));
client.on("connect", () => say("connected"));
createInterface({ input: process.stdin }).on("line", async (line) => {
  const [verb, topic, qos, payload] = JSON.parse(line);
  try {
    if (verb === "subscribe") {
      const [granted] = await client.subscribeAsync(topic, { qos });
      say("subscribed", granted.qos);
    } else if (verb === "publish") {
      await client.publishAsync(topic, payload, { qos });
      say("published");
    } else {
      await client.endAsync();
    }
  } catch (error) {
    say("error", String(error));
  }
});
