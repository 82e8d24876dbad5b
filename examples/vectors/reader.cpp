// examples, vectors: a router in C++ (router.hpp), judged by stored cases; nothing is installed.
//   g++ -std=c++17 -O2 -o reader reader.cpp && ./reader DIR        (DIR: moe-conformance vectors write DIR)
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "router.hpp"

string text(const string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}
// What follows "name": in a JSON whose entries have a line each; `otherwise` where it is not there.
double number(const string& json, const string& name, double otherwise) {
    size_t at = json.find("\"" + name + "\": ");
    if (at == string::npos) return otherwise;
    at += name.size() + 4;
    return json[at] == 't' ? 1 : json[at] == 'f' ? 0 : json[at] == '"' ? -INFINITY : std::stod(json.substr(at));
}
string line(const string& json, const string& name) {
    size_t at = json.find("  \"" + name + "\": {");
    return at == string::npos ? "" : json.substr(at, json.find('\n', at) - at);
}
template <class Number> std::vector<Number> tensor(const string& json, const string& data, const string& name, size_t size) {
    std::vector<Number> found(size);
    std::memcpy(found.data(), data.data() + size_t(number(line(json, name), "offset", 0)), size * sizeof(Number));
    return found;  // little-endian, as this machine is
}
int main(int, char** argv) {
    std::ifstream index(string(argv[1]) + "/index.json");
    int judged = 0, wrong = 0;
    for (string entry; std::getline(index, entry);) {
        if (entry.find("\"method\": \"route\"") == string::npos) continue;
        const string name = entry.substr(3, entry.find('"', 3) - 3), path = string(argv[1]) + "/" + name;
        const string json = text(path + ".json"), data = text(path + ".bin"), call = line(json, "spec"), none;
        const string spec = call.substr(call.find(": ") + 2), axes = json.substr(json.find("\"axes\": {\n"));
        const size_t T = number(axes, "T", 0), E = number(spec, "num_experts", 0), K = number(spec, "top_k", 0);
        const string inputs = json.substr(json.find("\n \"arguments\""), json.find("\n \"axes\"") - json.find("\n \"arguments\""));
        if (!T || !known(spec) || std::count(inputs.begin(), inputs.end(), '\n') > 4 + (line(json, "in.expert_bias_E") != none)) continue;
        const Row logits = tensor<float>(json, data, "in.logits_TE", T * E), weights = tensor<float>(json, data, "out.weights_TK", T * K);
        const Row bias = line(json, "in.expert_bias_E") == none ? Row(E) : tensor<float>(json, data, "in.expert_bias_E", E);
        const Row within = line(json, "out.weights_TK.tolerance") == none ? Row(T * K) : tensor<float>(json, data, "out.weights_TK.tolerance", T * K);
        const std::vector<int> ids = tensor<int>(json, data, "out.expert_ids_TK", T * K);
        bool right = true;
        for (size_t t = 0; t < T; ++t) {
            Row own;
            const std::vector<int> found = route(Row(&logits[t * E], &logits[t * E] + E), bias, spec, own);
            for (size_t k = 0; k < K; ++k) {  // the order of the slots is free: look for the expert
                const size_t at = std::find(found.begin(), found.end(), ids[t * K + k]) - found.begin();
                right = right && at < K && std::abs(double(own[at]) - weights[t * K + k]) <= within[t * K + k];
            }
        }
        ++judged, wrong += !right;
        if (!right) std::cout << name << " violates one of: " << json.substr(json.find(" \"requirements\""), json.find(" \"returns\"") - json.find(" \"requirements\"")) ;
    }
    std::cout << judged << " cases, " << wrong << " wrong\n";
    return wrong || !judged;
}
