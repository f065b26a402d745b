// The barest server around sharp: GET /3m.jpg?width=300&format=webp&quality=82, nothing kept.
import http from 'node:http';
import path from 'node:path';
import { createRequire } from 'node:module';

const sharp = createRequire(process.cwd() + '/')('sharp');
sharp.cache(false);

async function render(target) {
  const url = new URL(target, 'http://localhost');
  const file = path.join(process.env.PICTURES, path.basename(url.pathname));
  const format = url.searchParams.get('format');
  const quality = Number(url.searchParams.get('quality'));
  const width = Number(url.searchParams.get('width'));
  return { format, content: await sharp(file).resize({ width })[format]({ quality }).toBuffer() };
}

http.createServer(async (request, response) => {
  if (request.url === '/ready') return response.end();
  try {
    const { format, content } = await render(request.url);
    response.writeHead(200, { 'content-type': `image/${format}`, 'content-length': content.length });
    response.end(content);
  } catch (error) {
    response.writeHead(500);
    response.end(String(error));
  }
}).listen(Number(process.env.PORT), '127.0.0.1');
