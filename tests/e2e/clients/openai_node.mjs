// Drives the server with the Node openai package. Arguments: the folder that it is installed in, base URL, API key.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, baseURL, apiKey] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/package.json`)("openai").OpenAI;
const client = new OpenAI({ baseURL, apiKey });
const messages = [{ role: "user", content: "Hi" }];
const greeting = "Hello there 😀, how are you?";
const common = { model: "scripted", messages, temperature: 0 };
const tools = [{ type: "function", function: { name: "get_weather", parameters: { type: "object", properties: {} } } }];

assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["scripted"]);
assert.equal((await client.chat.completions.create(common)).choices[0].message.content, greeting);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...common, stream: true }))
  text += chunk.choices[0].delta.content ?? "";
assert.equal(text, greeting);

const final = await client.chat.completions.stream({ ...common, tools }).finalChatCompletion();
assert.deepEqual(final.choices[0].message.tool_calls.map((call) => call.function.name), ["get_weather", "get_time"]);
assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), { city: "Paris", days: [1, 2] });

assert.equal((await client.responses.create({ model: "scripted", input: "Hi", temperature: 0 })).output_text, greeting);
text = "";
for await (const event of await client.responses.create({ model: "scripted", input: "Hi", temperature: 0, stream: true }))
  if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, greeting);

const completion = await client.completions.create({ model: "scripted", prompt: "Let me", temperature: 0, max_tokens: 2 });
assert.equal(completion.choices[0].text, " look.\n<tool_");
const vectors = await client.embeddings.create({ model: "scripted", input: ["Hello"] });
assert.equal(vectors.data[0].embedding.length, 512);
await assert.rejects(client.chat.completions.create({ ...common, model: "gpt-4" }), { status: 404, code: "model_not_found" });
