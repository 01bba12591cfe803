// The request as a command for a shell: what is copied sends the same bytes as the page does.

import { address, GENERATE_HEADERS, hasKey } from "./api.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The command for a body. The key is not in it: it is read from the variable that the server itself knows. */
export function curlFor(body) {
  const headers = Object.entries(GENERATE_HEADERS).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  if (hasKey()) headers.push('-H "Authorization: Bearer $CACHEFLOW_API_KEY"');
  return [`curl -N ${quoted(address("generate"))}`, ...headers, `--data-raw ${quoted(body)}`].join(" \\\n  ");
}
