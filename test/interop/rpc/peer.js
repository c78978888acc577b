'use strict';
// A server or a client of sofa-rpc-node, over SOFABolt (sofa-bolt-node) or Dubbo
// (dubbo-remoting): peer.js serve|call|asks|asked PROTOCOL ADDRESS. A client prints
// a line of JSON for each call: its method, and its result or its error. A server
// that asks calls its client back, and is who prints.
const [ , , act, protocol, address ] = process.argv;
const { RpcServer } = require('sofa-rpc-node').server;
const { RpcClient } = require('sofa-rpc-node').client;
const { RpcRequest } = require('sofa-rpc-node').client;
const bolt = require('sofa-bolt-node');
const net = require('net');
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

// talk is both ends' reading and writing of one connection, which the packages above
// leave to clients in the one direction and to servers in the other.
function talk(socket) {
  const sentReqs = new Map();
  const options = () => ({ sentReqs, classCache: new Map(), address: { query: {} }, logger: quiet });
  const encoder = chosen.encoder(options()), decoder = codec.decoder(options());
  encoder.pipe(socket).pipe(decoder);
  const ask = (id, method, told) => {
    const req = new RpcRequest({ serverSignature: 'com.test.Back:1.0', methodName: method, args: [ id, 2 ], timeout: 10000 });
    sentReqs.set(id, { req, told });
    encoder.writeRequest(id, req);
  };
  decoder.on('response', res => {
    const { told } = sentReqs.get(res.packetId);
    sentReqs.delete(res.packetId);
    told(res.data.error ? { error: String(res.data.error.message) } : { result: res.data.appResponse });
  });
  const answer = (req, result) => encoder.writeResponse(req, { isError: false, errorMsg: null, appResponse: result });
  return { ask, answer, decoder };
}

// asks calls each client back when that has asked, with the same ids.
async function asks() {
  net.createServer(socket => {
    const { ask, answer, decoder } = talk(socket);
    decoder.on('request', req => {
      answer(req, 1); // of 0 dubbo-remoting writes half an answer
      for (const [ id, method ] of [[ 1, 'plus' ], [ 2, 'drop' ], [ 3, 'plus' ]]) {
        ask(id, method, told => console.log(JSON.stringify(Object.assign({ method }, told))));
      }
    });
  }).listen(Number(address), () => console.log('ready'));
}

// asked asks, and answers what it is asked.
async function asked() {
  const [ host, port ] = address.split(':');
  const { ask, answer, decoder } = talk(net.connect(Number(port), host));
  decoder.on('request', req => {
    console.log(req.data.methodName);
    answer(req, req.data.args[0] + req.data.args[1]);
  });
  ask(1, 'hello', told => console.log(told.error || 'told'));
}

({ serve, call, asks, asked })[act]().catch(err => { console.error(err); process.exit(1); });
