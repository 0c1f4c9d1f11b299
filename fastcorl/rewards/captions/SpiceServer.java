import edu.anu.spice.Evaluation;
import edu.anu.spice.SceneGraph;
import edu.anu.spice.SpiceParser;
import edu.anu.spice.TupleSet;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.json.simple.JSONArray;
import org.json.simple.JSONObject;
import org.json.simple.parser.JSONParser;

/**
 * Scores pairs of captions with SPICE for as long as its input lasts: one JSON object per line in, one per line out.
 *
 * <p>First it writes {"ready": true}. A request {"pairs": [[reference, candidate], ..]} is answered by
 * {"scores": [number or null, ..]}, null where the reference has no tuple, and a failure by {"error": "..."}. Parses are
 * kept, the least used are dropped. Compiled by spice.py against spice-1.0.jar; Java 8 and later.
 */
@SuppressWarnings("unchecked")
public final class SpiceServer {
  private static final int KEPT_CAPTIONS = 100000;

  private final SpiceParser parser;
  private final Map<String, TupleSet> parsed =
      new LinkedHashMap<String, TupleSet>(1024, 0.75f, true) {
        @Override
        protected boolean removeEldestEntry(Map.Entry<String, TupleSet> eldest) {
          return size() > KEPT_CAPTIONS;
        }
      };

  private SpiceServer(int threads) {
    // no cache folder: LMDB and its serializer fail on newer Java
    parser = new SpiceParser(null, threads, true);
    parser.parseCaptions(new ArrayList<>(Arrays.asList("a dog"))); // loads the models, so that a missing one shows now
  }

  public static void main(String[] arguments) throws Exception {
    PrintStream replies = new PrintStream(System.out, true, "UTF-8");
    System.setOut(System.err); // what libraries print must not mix with replies
    BufferedReader requests = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    SpiceServer server = new SpiceServer(Integer.parseInt(arguments[0]));
    replies.println("{\"ready\": true}");
    for (String line = requests.readLine(); line != null; line = requests.readLine()) {
      JSONObject reply = new JSONObject();
      try {
        JSONObject request = (JSONObject) new JSONParser().parse(line);
        reply.put("scores", server.score((JSONArray) request.get("pairs")));
      } catch (Exception error) {
        error.printStackTrace();
        reply.put("error", error.toString());
      }
      replies.println(reply.toJSONString());
    }
  }

  private JSONArray score(JSONArray pairs) {
    Set<String> captions = new LinkedHashSet<>();
    for (Object pair : pairs) {
      captions.addAll((JSONArray) pair);
    }
    Map<String, TupleSet> graphs = parse(captions);
    JSONArray scores = new JSONArray();
    for (Object item : pairs) {
      JSONArray pair = (JSONArray) item;
      // the two flags: NaN for a reference without tuples; synonyms match
      Evaluation evaluation = new Evaluation(graphs.get(pair.get(1)), graphs.get(pair.get(0)), true, true);
      scores.add(Double.isNaN(evaluation.f) ? null : evaluation.f);
    }
    return scores;
  }

  private Map<String, TupleSet> parse(Set<String> captions) {
    Map<String, TupleSet> found = new LinkedHashMap<>();
    List<String> unknown = new ArrayList<>();
    for (String caption : captions) {
      TupleSet tuples = parsed.get(caption);
      if (tuples == null) {
        unknown.add(caption);
      } else {
        found.put(caption, tuples);
      }
    }
    if (!unknown.isEmpty()) {
      List<SceneGraph> graphs = parser.parseCaptions(unknown);
      for (int index = 0; index < graphs.size(); index++) {
        TupleSet tuples = new TupleSet(graphs.get(index));
        parsed.put(unknown.get(index), tuples);
        found.put(unknown.get(index), tuples);
      }
    }
    return found;
  }
}
