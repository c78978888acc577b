'use strict';
// A server or a client of sofa-rpc-node, over SOFABolt (sofa-bolt-node) or Dubbo
// (dubbo-remoting): peer.js serve|call PROTOCOL ADDRESS. A client prints a line
// of JSON for each call: its method, and its result or its error.
const [ , , act, protocol, address ] = process.argv;
const { RpcServer } = require('sofa-rpc-node').server;
const { RpcClient } = require('sofa-rpc-node').client;
const bolt = require('sofa-bolt-node');
const quiet = { info() {}, debug() {}, warn: console.error, error: console.error };

const protocols = {
  bolt: { codec: bolt },
  // Version 2 with its sum.
  bolt2: { codec: bolt, options: { protocolType: 'bolt2', boltVersion: 2, crcEnable: true } },
  dubbo: { codec: require('dubbo-remoting') },
};
const { codec, options } = protocols[protocol];
const chosen = options ? Object.assign({}, codec, { encoder: o => codec.encoder(Object.assign({}, o, options)) }) : codec;

const service = { interfaceName: 'com.test.S', version: '1.0' };

async function serve() {
  const server = new RpcServer({ logger: quiet, port: Number(address), protocol: chosen });
  server.addService(service, {
    async plus(a, b) { return a + b; },
    async long(s) { return s + s; },
    async echo(o) { return { $class: 'com.test.Order', $: { id: o.id, text: o.text, parts: o.parts, at: o.at } }; },
    async fail(s) { throw new Error(s); },
    async drop() { console.log('dropped'); return 'gone'; },
  });
  await server.start();
  console.log('ready');
}

async function call() {
  const client = new RpcClient({ logger: quiet, protocol: chosen });
  const consumer = client.createConsumer(Object.assign({ serverHost: address }, service));
  await consumer.ready();
  const one = async (method, args) => {
    try {
      const result = await consumer.invoke(method, args, { responseTimeout: 10000 });
      console.log(JSON.stringify({ method, result: typeof result === 'string' && result.length > 100 ? result.length : result }));
    } catch (err) {
      console.log(JSON.stringify({ method, error: String(err.message) }));
    }
  };
  await one('plus', [ 1, 2 ]);
  await one('drop', []);
  await one('long', [ 'x'.repeat(50000) ]);
  await Promise.all([ one('plus', [ 3, 4 ]), one('drop', []), one('plus', [ 5, 6 ]) ]);
  process.exit(0);
}

(act === 'serve' ? serve() : call()).catch(err => { console.error(err); process.exit(1); });
