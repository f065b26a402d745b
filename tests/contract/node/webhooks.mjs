// Uploads a picture with two extensions that do not answer in time, says so on standard output,
// and unwraps both webhooks in a receiver of its own.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { text } from 'node:stream/consumers';
import ImageKit, { toFile } from '@imagekit/nodejs';

const { BASE_URL, PRIVATE_KEY, WEBHOOK_SECRET } = process.env;
const client = new ImageKit({
  privateKey: PRIVATE_KEY,
  baseURL: BASE_URL,
  webhookSecret: WEBHOOK_SECRET,
});

const events = new Map();
const receiver = createServer(async (request, response) => {
  const body = await text(request);
  try {
    const event = client.webhooks.unwrap(body, { headers: request.headers });
    for (const [changed, key] of [[`${body} `, WEBHOOK_SECRET], [body, 'whsec_other']]) {
      assert.throws(() => client.webhooks.unwrap(changed, { headers: request.headers, key }));
    }
    events.set(event.service, event);
    response.end();
  } catch (error) {
    console.error(error);
    process.exitCode = 1;
    response.writeHead(400).end();
  }
  receiver.emit('event');
});

receiver.listen(0, '127.0.0.1');
await once(receiver, 'listening');
const uploaded = await client.files.upload({
  file: await toFile(readFileSync(process.argv[2]), 'cat.jpg'),
  fileName: 'cat.jpg',
  extensions: [
    { name: 'google-auto-tagging', minConfidence: 98, maxTags: 5 },
    { name: 'aws-auto-tagging', minConfidence: 98, maxTags: 5 },
  ],
  webhookUrl: `http://127.0.0.1:${receiver.address().port}/hooks`,
});
assert.deepEqual(uploaded.extensionStatus, {
  'google-auto-tagging': 'pending',
  'aws-auto-tagging': 'pending',
});
console.log('pending');
while (events.size < 2 && !process.exitCode) await once(receiver, 'event');
receiver.close();

const success = events.get('google-auto-tagging');
assert.equal(success.status, 'SUCCESS');
assert.equal(success.fileObject.fileId, uploaded.fileId);
assert.deepEqual(success.fileObject.AITags, [
  { name: 'Cat', confidence: 98.5, source: 'google-auto-tagging' },
]);
const failure = events.get('aws-auto-tagging');
assert.equal(failure.status, 'FAILURE');
assert.equal(failure.fileId, uploaded.fileId);
assert.deepEqual(Object.keys(failure.error).sort(), ['message', 'reason']);
