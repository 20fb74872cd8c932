#include "bundle.hpp"

#include <array>
#include <filesystem>
#include <fstream>
#include <vector>

namespace darcnn {
namespace {

constexpr std::uintmax_t kMiB = 1 << 20;
const std::map<std::string, std::uintmax_t> kMemberCaps = {
    {"manifest.json", kMiB}, {"detect.onnx", 192 * kMiB}, {"mask.onnx", 64 * kMiB}, {"training.json", kMiB}, {"LICENSE", kMiB}};
constexpr std::uintmax_t kFileCap = 260 * kMiB;  // all members, and 1 MiB for the zip's own tables
const char *const kAgain = "copy or download it again";
const char *const kExport = "export the model again";

[[noreturn]] void refuse(const std::string &path, const std::string &problem, const std::string &fix = kAgain) {
    throw Error(DARCNN_ERROR_BUNDLE, path, problem, fix);
}

using Word = std::uint32_t;

Word rotate(Word value, int bits) { return value >> bits | value << (32 - bits); }

// FIPS 180-4: the fractions of the square and of the cube roots of the first primes.
constexpr std::array<Word, 8> kInitial = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
constexpr std::array<Word, 64> kRounds = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
    0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
    0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
    0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

void mix_block(std::array<Word, 8> &state, std::string_view block) {
    std::array<Word, 64> w{};
    for (std::size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | static_cast<unsigned char>(block[i]);
    for (std::size_t t = 16; t < 64; ++t) {
        const Word s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
        const Word s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t t = 0; t < 64; ++t) {
        const Word s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        const Word t1 = h + s1 + ((e & f) ^ (~e & g)) + kRounds[t] + w[t];
        const Word t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const Word step[] = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state[i] += step[i];
}

Word crc32(std::string_view content) {  // of zip files (ISO 3309)
    std::array<Word, 256> table{};
    for (Word n = 0; n < 256; ++n) {
        table[n] = n;
        for (int bit = 0; bit < 8; ++bit) table[n] = table[n] >> 1 ^ (table[n] & 1 ? 0xEDB88320U : 0U);
    }
    Word rest = ~0U;
    for (const char c : content) rest = rest >> 8 ^ table[(rest ^ static_cast<unsigned char>(c)) & 255];
    return ~rest;
}

using Members = std::vector<std::pair<std::string, std::string_view>>;

// The members of a zip without compression, sizes and checksums verified (PKWARE APPNOTE, 4.3).
Members read_zip(const std::string &path, std::string_view content) {
    constexpr std::size_t kEnd = 22, kMaxComment = 65535, kEntry = 46, kHeader = 30, kEncrypted = 1;
    const auto number = [&](std::size_t at, int n_bytes) {  // little-endian
        Word value = 0;
        for (int i = n_bytes - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(content[at + i]);
        return value;
    };
    const auto has = [&](std::size_t at, std::size_t size, const char *magic) {
        return at + size <= content.size() && content.substr(at, 4) == magic;
    };
    if (!has(0, 4, "PK\x03\x04")) refuse(path, "is not a bundle", "name a .darcnn file");
    const std::size_t end = content.rfind("PK\x05\x06");
    const bool has_end = end != std::string_view::npos && end + kEnd <= content.size();
    if (!has_end || content.size() - end > kEnd + kMaxComment) refuse(path, "is cut short or damaged");
    Members members;
    std::size_t at = number(end + 16, 4);  // of the first entry of the central directory
    for (unsigned left = number(end + 10, 2); left > 0; --left) {
        if (!has(at, kEntry, "PK\x01\x02") || at + kEntry + number(at + 28, 2) > end) refuse(path, "is cut short or damaged");
        const std::string name(content.substr(at + kEntry, number(at + 28, 2)));
        if (number(at + 10, 2) != 0) refuse(path, name + " is compressed", "use it as darcnn-export wrote it, not repacked");
        const std::size_t header = number(at + 42, 4), size = number(at + 24, 4);
        const bool is_plain = number(at + 20, 4) == size && !(number(at + 8, 2) & kEncrypted);
        if (!is_plain || !has(header, kHeader, "PK\x03\x04")) refuse(path, name + " is damaged");
        const std::size_t start = header + kHeader + number(header + 26, 2) + number(header + 28, 2);
        const bool is_whole = start + size <= content.size() && number(header + 26, 2) == name.size() &&
                              content.substr(header + kHeader, name.size()) == name;
        if (!is_whole || crc32(content.substr(start, size)) != number(at + 16, 4)) refuse(path, name + " is damaged");
        members.emplace_back(name, content.substr(start, size));
        at += kEntry + name.size() + number(at + 30, 2) + number(at + 32, 2);
    }
    if (at != end || number(end + 16, 4) + number(end + 12, 4) != end) refuse(path, "is cut short or damaged");
    return members;
}

JsonTable parse_table(const std::string &path, std::string_view text) {
    JsonTable table = parse_json(text);
    if (table[""].kind != Json::Kind::object) refuse(path, "manifest.json is not a table");
    const Json &format = table["format"];
    if (!format.is_integer || format.number < 1) refuse(path, "manifest.json names no format");
    if (format.number > kFormat)
        refuse(path, "made by a newer darcnn, this one reads format " + std::to_string(kFormat), "upgrade libdarcnn");
    return table;
}

}  // namespace

std::string read_file(const std::string &path, std::uintmax_t cap) {
    const std::filesystem::path place = std::filesystem::u8path(path);
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(place, error);
    if (!std::filesystem::exists(status)) refuse(path, "no such file", "check the path");
    if (!std::filesystem::is_regular_file(status)) refuse(path, "is a folder or a device", "name a file");
    const std::uintmax_t size = std::filesystem::file_size(place, error);
    if (size > cap) refuse(path, "has " + std::to_string(size / kMiB) + " MiB, too many", "name another file");
    std::string content(static_cast<std::size_t>(size), '\0');
    std::ifstream file(place, std::ios::binary);
    if (!file.read(content.data(), static_cast<std::streamsize>(size))) refuse(path, "cannot be read", "check the disk");
    if (content.empty()) refuse(path, "is empty");
    return content;
}

std::string sha256(std::string_view content) {
    std::array<Word, 8> state = kInitial;
    const std::size_t whole = content.size() / 64 * 64;
    for (std::size_t at = 0; at < whole; at += 64) mix_block(state, content.substr(at));
    // the rest, a 1 bit, zeros, and the length in bits as the last 8 bytes of a block
    std::string tail(content.substr(whole));
    tail += '\x80';
    tail.resize(tail.size() <= 56 ? 56 : 120, '\0');
    for (int shift = 56; shift >= 0; shift -= 8) tail += static_cast<char>(std::uint64_t{content.size()} * 8 >> shift);
    for (std::size_t at = 0; at < tail.size(); at += 64) mix_block(state, std::string_view(tail).substr(at));
    std::string hex;
    for (const Word word : state)
        for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
    return hex;
}

Bundle::Bundle(const std::string &file) : path(file), content(read_file(file, kFileCap)) {
    const Members found = read_zip(path, content);
    try {
        JsonTable table;
        for (const auto &[name, member] : found)  // first: a newer format may have other members
            if (name == "manifest.json") table = parse_table(path, member);
        for (const auto &[name, member] : found) {
            const auto cap = kMemberCaps.find(name);
            if (cap == kMemberCaps.end()) refuse(path, "holds '" + name + "', which no bundle has");
            if (member.size() > cap->second) refuse(path, name + " has too many MiB", kExport);
            if (!members.emplace(name, member).second) refuse(path, "holds " + name + " more than once");
        }
        for (const auto &[name, cap] : kMemberCaps)
            if (!members.count(name)) refuse(path, "lacks " + name);
        manifest = parse_manifest(table);
        for (const char *graph : {"detect", "mask"}) check_signature(manifest, graph, "manifest.json", manifest.graphs[graph]);
    } catch (const JsonError &err) {
        refuse(path, std::string("manifest.json is wrong (") + err.what() + ")", kExport);
    }
    for (const auto &[name, member] : members) {
        if ((name == "manifest.json") == manifest.files.count(name) || manifest.files.size() != members.size() - 1)
            refuse(path, "manifest.json does not list the other members", kExport);
        if (name != "manifest.json" && sha256(member) != manifest.files.at(name))
            refuse(path, name + " is not what manifest.json says (sha256)");
        // no tensor names another file, for which no hash vouches, without this word
        if (name.find(".onnx") != std::string::npos && member.find("location") != std::string_view::npos)
            refuse(path, name + " keeps weights in another file", kExport);
    }
}

}  // namespace darcnn
