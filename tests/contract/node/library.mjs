// Uploads, reads, updates, lists and deletes with ImageKit's official SDK, as its users do.
// Throws at the first thing that is not as it should be. Picture: the path in argv.

import assert from 'node:assert/strict';
import { createReadStream, readFileSync } from 'node:fs';
import ImageKit, { toFile } from '@imagekit/nodejs';

const { BASE_URL, PRIVATE_KEY } = process.env;
const picturePath = process.argv[2];
const picture = readFileSync(picturePath);
const client = new ImageKit({ privateKey: PRIVATE_KEY, baseURL: BASE_URL });

async function bytesOf(url) {
  const answer = await fetch(url);
  assert.equal(answer.status, 200, url);
  return Buffer.from(await answer.arrayBuffer());
}

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail('should have been refused');
}

const files = {
  stream: createReadStream(picturePath),
  toFile: await toFile(picture, 'other.png'),
  base64: picture.toString('base64'),
  'data URI': `data:image/jpeg;base64,${picture.toString('base64')}`,
};
for (const [kind, file] of Object.entries(files)) {
  const answer = await client.files.upload({ file, fileName: 'cat.jpg' });
  assert.deepEqual(await bytesOf(answer.url), picture, kind);
  await client.files.delete(answer.fileId);
}

const uploaded = await client.files.upload({
  file: await toFile(picture, 'cat.jpg'),
  fileName: 'cat 猫.jpg',
  folder: '/pets',
  useUniqueFileName: false,
  tags: ['cat', 'tabby'],
  customCoordinates: '1,2,30,40',
  description: 'A cat.',
  isPrivateFile: true,
  responseFields: ['tags', 'customCoordinates', 'isPrivateFile'],
  extensions: [{ name: 'google-auto-tagging', minConfidence: 98, maxTags: 5 }],
});
const tags = [{ name: 'Cat', confidence: 98.5, source: 'google-auto-tagging' }];
assert.equal(uploaded.filePath, '/pets/cat_猫.jpg');
assert.deepEqual(uploaded.tags, ['cat', 'tabby']);
assert.equal(uploaded.customCoordinates, '1,2,30,40');
assert.equal(uploaded.isPrivateFile, true);
assert.deepEqual(uploaded.AITags, tags);
assert.deepEqual(uploaded.extensionStatus, { 'google-auto-tagging': 'success' });

const { fileId } = uploaded;
const details = await client.files.get(fileId);
assert.deepEqual(details.AITags, tags);
assert.equal(details.description, 'A cat.');
assert.equal((await fetch(details.url)).status, 401);
await bytesOf(details.thumbnail);
for (const options of [{ signed: true }, { expiresIn: 60 }]) {
  const urlEndpoint = `${BASE_URL}/demo`;
  const url = client.helper.buildSrc({ src: details.filePath, urlEndpoint, ...options });
  assert.deepEqual(await bytesOf(url), picture);
}

const updated = await client.files.update(fileId, {
  tags: null,
  customCoordinates: null,
  description: 'Another cat.',
  removeAITags: 'all',
});
assert.equal(updated.tags, null);
assert.equal(updated.customCoordinates, null);
assert.equal(updated.description, 'Another cat.');
assert.equal(updated.AITags, null);
const tagged = await client.files.update(fileId, {
  extensions: [{ name: 'google-auto-tagging', minConfidence: 98, maxTags: 5 }],
});
assert.deepEqual(tagged.AITags, tags);
assert.deepEqual(tagged.extensionStatus, { 'google-auto-tagging': 'success' });
const draft = await client.files.update(fileId, { publish: { isPublished: false } });
assert.equal(draft.isPublished, false);

const listed = await client.assets.list({ path: '/pets', fileType: 'image', limit: 10 });
assert.deepEqual(listed.map((file) => file.fileId), [fileId]);

await client.files.delete(fileId);
const missing = await refusal(client.files.get(fileId));
assert.ok(missing instanceof ImageKit.NotFoundError);
assert.match(missing.message, /The requested file does not exist\./);
const malformed = await refusal(client.files.upload({ file: 'AAAA', fileName: '' }));
assert.ok(malformed instanceof ImageKit.BadRequestError);
assert.match(malformed.message, /fileName/);
const stranger = new ImageKit({ privateKey: 'private_wrong', baseURL: BASE_URL });
assert.ok((await refusal(stranger.assets.list())) instanceof ImageKit.PermissionDeniedError);
assert.deepEqual(await client.assets.list(), []);

const form = new FormData();
const parameters = client.helper.getAuthenticationParameters();
const fields = { fileName: 'cat.jpg', publicKey: process.env.PUBLIC_KEY, ...parameters };
for (const [name, value] of Object.entries(fields)) form.append(name, value);
form.append('file', new Blob([picture]));
const fromBrowser = await fetch(`${BASE_URL}/api/v1/files/upload`, { method: 'POST', body: form });
assert.equal(fromBrowser.status, 200, await fromBrowser.text());
